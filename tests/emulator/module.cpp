// The emulated kernels on numpy arrays. 16-bit elements travel as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "kernels.h"
#include "memory.h"
#include "misuse.h"

namespace py = pybind11;
using namespace lora_kernels;
using Array = py::array_t<uint16_t>;

namespace {

Matrix matrix_of(const Array& a, bool is_bf16) {
  if (a.ndim() != 2) throw py::value_error("a matrix has two dimensions");
  return {const_cast<uint16_t*>(a.data()), a.strides(0) / 2, a.strides(1) / 2,
          is_bf16 ? Dtype::bf16 : Dtype::f16};
}

// The memory between the first and the last element of a view.
void add_buffer(const std::string& name, const Array& a, emu::Use use) {
  if (a.size() == 0) return;
  int64_t low = 0, high = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = (a.shape(i) - 1) * a.strides(i);
    (reach < 0 ? low : high) += reach;
  }
  auto* first = reinterpret_cast<uint8_t*>(const_cast<uint16_t*>(a.data())) + low;
  emu::global.add(name, first, static_cast<uint64_t>(high - low + 2), use);
}

emu::Options options_of(uint64_t seed, const std::string& timing, int resident_blocks) {
  emu::Options o;
  o.seed = seed;
  o.resident_blocks = resident_blocks;
  if (timing == "early")
    o.timing = emu::Timing::early;
  else if (timing == "late")
    o.timing = emu::Timing::late;
  else if (timing != "random")
    throw py::value_error("timing is early, late or random");
  return o;
}

py::dict run(const std::vector<emu::Launch>& launches, const emu::Options& options) {
  emu::Machine machine;
  machine.run(launches, options);
  py::dict found;
  found["kernels"] = py::cast([&] {
    std::vector<std::string> names;
    for (const auto& l : launches) names.push_back(l.name);
    return names;
  }());
  found["bank_conflicts"] = machine.statistics.bank_conflicts;
  found["bytes_loaded"] = machine.statistics.bytes_loaded;
  found["rounds"] = machine.round;
  return found;
}

DownProjArgs down_proj_args(const Array& x, const Array& down, const Array& h, bool is_bf16,
                            const std::vector<int64_t>& seed, uint32_t threshold, float scale) {
  if (x.shape(1) != down.shape(1) || h.shape(0) != x.shape(0) || h.shape(1) != down.shape(0))
    throw py::value_error("x [M, K], down [r, K] and h [M, r] do not fit together");
  const Dropout dropout{seed.empty() ? nullptr : seed.data(), static_cast<int>(seed.size()),
                        threshold};
  return {matrix_of(x, is_bf16), matrix_of(down, is_bf16), matrix_of(h, is_bf16), x.shape(0),
          x.shape(1), down.shape(0), scale, dropout};
}

py::dict plan(const Array& x, const Array& down, const Array& h, const std::vector<int64_t>& seed,
              int compute, int multiprocessors) {
  const DownProjArgs args = down_proj_args(x, down, h, true, seed, 0, 1.0f);
  const DownProjPlan p = plan_down_proj(rank_slice(args, 0), compute, multiprocessors);
  py::dict found;
  const char* names[] = {"none", "sm80", "sm90"};
  found["kernel"] = names[static_cast<int>(p.kernel)];
  found["rank"] = p.rank;
  found["rows"] = p.rows;
  found["depth"] = p.depth;
  found["stages"] = p.stages;
  found["threads"] = p.threads;
  found["shared_bytes"] = p.shared_bytes;
  found["blocks"] = p.blocks;
  found["mn_major"] = p.layout.mn_major;
  found["vectors"] = py::make_tuple(p.layout.x_vectors, p.layout.down_vectors);
  found["reason"] = p.reason;
  return found;
}

// Writes h, which is poisoned before; raises RuntimeError with the emulator's report.
py::dict down_proj(const Array& x, const Array& down, Array h, bool is_bf16,
                   const std::vector<int64_t>& seed, uint32_t threshold, float scale, int compute,
                   int multiprocessors, uint64_t schedule, const std::string& timing,
                   int resident_blocks) {
  const DownProjArgs args = down_proj_args(x, down, h, is_bf16, seed, threshold, scale);
  emu::global.clear();
  add_buffer("x", x, emu::Use::input);
  add_buffer("down", down, emu::Use::input);
  add_buffer("h", h, emu::Use::output);
  return run(emu::down_proj_launches(args, compute, multiprocessors),
             options_of(schedule, timing, resident_blocks));
}

void misuse(const std::string& name, bool wrong, uint64_t schedule, const std::string& timing) {
  emu::run_misuse(name, wrong, options_of(schedule, timing, 1 << 20));
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  py::register_exception<emu::Error>(m, "EmulatorError", PyExc_RuntimeError);
  m.def("misuse_cases", &emu::misuse_cases);
  m.def("misuse", &misuse, py::arg("name"), py::arg("wrong"), py::arg("schedule") = 0,
        py::arg("timing") = "random");
  m.def("plan", &plan);
  m.def("down_proj", &down_proj, py::arg("x"), py::arg("down"), py::arg("h"), py::arg("is_bf16"),
        py::arg("seed"), py::arg("threshold"), py::arg("scale"), py::arg("compute"),
        py::arg("multiprocessors"), py::arg("schedule") = 0, py::arg("timing") = "random",
        py::arg("resident_blocks") = 1 << 20);
}

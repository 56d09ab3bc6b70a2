// The emulated kernels on numpy arrays. 16-bit elements travel as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "instructions.h"
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
  return {matrix_of(x, is_bf16),
          matrix_of(down, is_bf16),
          matrix_of(h, is_bf16),
          x.shape(0),
          x.shape(1),
          down.shape(0),
          scale,
          dropout};
}

// Of each tile, by its name in a demangled kernel.
std::map<std::string, int> shared_bytes() {
  std::map<std::string, int> found;
#define LK_TILE(...) \
  found["DownProjSm80Tile<" #__VA_ARGS__ ">"] = DownProjSm80Tile<__VA_ARGS__>::kSharedBytes;
  LK_DOWN_PROJ_SM80_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) \
  found["DownProjSm90Tile<" #__VA_ARGS__ ">"] = DownProjSm90Tile<__VA_ARGS__>::kSharedBytes;
  LK_DOWN_PROJ_SM90_TILES(LK_TILE)
#undef LK_TILE
  return found;
}

py::dict plan(const Array& x, const Array& down, const Array& h, const std::vector<int64_t>& seed,
              int compute, int multiprocessors, bool sm90a) {
  const DownProjArgs args = down_proj_args(x, down, h, true, seed, 0, 1.0f);
  const DownProjPlan p = plan_down_proj(args, {compute, multiprocessors, sm90a});
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
  found["rank_blocks"] = p.rank_blocks;
  found["text"] = describe(p);
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
  return run(emu::down_proj_launches(args, {compute, multiprocessors, true}),
             options_of(schedule, timing, resident_blocks));
}

py::dict gemm_probe(const Array& a, const Array& b, Array c, int tile_n, bool trans_a, bool trans_b,
                    int clusters, uint64_t schedule, const std::string& timing,
                    int resident_blocks) {
  emu::global.clear();
  add_buffer("a", a, emu::Use::input);
  add_buffer("b", b, emu::Use::input);
  add_buffer("c", c, emu::Use::output);
  const auto K = static_cast<int>(a.shape(trans_a ? 0 : 1));
  return run(
      {emu::gemm_probe_launch(a.data(), b.data(), c.mutable_data(), static_cast<int>(c.shape(0)),
                              static_cast<int>(c.shape(1)), K, tile_n, trans_a, trans_b, clusters)},
      options_of(schedule, timing, resident_blocks));
}

// `grids` of them at once, each with its own h, out, ticket and flags.
py::dict relay_probe(const Array& in, std::vector<Array> h, std::vector<Array> out, int blocks,
                     uint64_t schedule, const std::string& timing, int resident_blocks) {
  emu::global.clear();
  add_buffer("in", in, emu::Use::input);
  const int tiles = static_cast<int>(in.shape(0) / 64);
  std::vector<std::vector<uint32_t>> words(h.size(), std::vector<uint32_t>(1 + tiles));
  std::vector<emu::Launch> launches;
  for (size_t i = 0; i < h.size(); ++i) {
    add_buffer("h", h[i], emu::Use::output);
    add_buffer("out", out[i], emu::Use::output);
    emu::global.add("flags", words[i].data(), words[i].size() * 4, emu::Use::workspace);
    launches.push_back(emu::relay_probe_launch(in.data(), h[i].mutable_data(),
                                               out[i].mutable_data(), words[i].data(),
                                               words[i].data() + 1, tiles, blocks));
  }
  return run(launches, options_of(schedule, timing, resident_blocks));
}

emu::OperandSpec operand_of(const py::dict& o) {
  const auto data = o["data"].cast<Array>();
  const auto box = o["box"].cast<std::array<int, 2>>();
  return {data.data(),
          data.shape(0),
          data.shape(1),
          box[0],
          box[1],
          o["copies"].cast<std::vector<std::array<int, 3>>>(),
          o["descriptor"].cast<uint64_t>(),
          o["starts"].cast<std::vector<uint32_t>>(),
          o["transposed"].cast<bool>()};
}

std::vector<float> wgmma(const py::dict& a, const py::dict& b, int n, bool is_bf16,
                         const std::vector<uint32_t>& a_registers, const std::string& timing) {
  return emu::run_wgmma(operand_of(a), operand_of(b), n, is_bf16, a_registers,
                        options_of(0, timing, 1 << 20));
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
  m.def("gemm_probe", &gemm_probe);
  m.def("relay_probe", &relay_probe);
  m.def("wgmma", &wgmma);
  m.def("ldmatrix", &emu::run_ldmatrix);
  m.def("stmatrix", &emu::run_stmatrix);
  m.def("mma", &emu::run_mma);
  m.def("descriptors", [](uint32_t panel_bytes) {
    return py::make_tuple(k_major_descriptor(0), mn_major_descriptor(0, panel_bytes), kKMajorStep,
                          kMnMajorStep);
  });
  m.def("shared_bytes", &shared_bytes);
  m.def("plan", &plan, py::arg("x"), py::arg("down"), py::arg("h"), py::arg("seed"),
        py::arg("compute"), py::arg("multiprocessors"), py::arg("sm90a") = true);
  m.def("down_proj", &down_proj, py::arg("x"), py::arg("down"), py::arg("h"), py::arg("is_bf16"),
        py::arg("seed"), py::arg("threshold"), py::arg("scale"), py::arg("compute"),
        py::arg("multiprocessors"), py::arg("schedule") = 0, py::arg("timing") = "random",
        py::arg("resident_blocks") = 1 << 20);
}

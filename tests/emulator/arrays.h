// numpy arrays as operands of emulated kernels. 16-bit elements travel as uint16.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace py = pybind11;
using namespace lora_kernels;
using Array = py::array_t<uint16_t>;

inline Matrix matrix_of(const Array& a, bool is_bf16) {
  if (a.ndim() != 2) throw py::value_error("a matrix has two dimensions");
  return {const_cast<uint16_t*>(a.data()), a.strides(0) / 2, a.strides(1) / 2,
          is_bf16 ? Dtype::bf16 : Dtype::f16};
}

// The memory between the first and the last element of a view.
inline void add_buffer(const std::string& name, const Array& a, emu::Use use) {
  if (a.size() == 0) return;
  int64_t low = 0, high = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = (a.shape(i) - 1) * a.strides(i);
    (reach < 0 ? low : high) += reach;
  }
  auto* first = reinterpret_cast<uint8_t*>(const_cast<uint16_t*>(a.data())) + low;
  emu::global.add(name, first, static_cast<uint64_t>(high - low + 2), use);
}

inline emu::Options options_of(uint64_t seed, const std::string& timing, int resident_blocks) {
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

inline py::dict run(const std::vector<emu::Launch>& launches, const emu::Options& options) {
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

struct Scalars {
  bool is_bf16;
  float h_scale, up_scale, masked_scale;
  uint32_t threshold;
  std::vector<int64_t> seed;
  Target target;
  std::string form;
  FusedGemmRequest request;
  uint32_t chain;
  DecodeRequest decode;
  emu::Options options;
};

// {"bf16": True, "scale": (h, up), "masked_scale": up, "seed": [...], "threshold": T, "compute":
// 90,
//  "multiprocessors": n, "form": "", "tile_n": 0, "group": 0, "chain": 0, "rows": 0,
//  "decode_n": 0, "splits": 0, "schedule": 0, "timing": "random", "resident_blocks": n}, all
//  optional.
inline Scalars scalars_of(const py::dict& given) {
  const auto get = [&](const char* name, auto otherwise) {
    return given.contains(name) ? given[name].cast<decltype(otherwise)>() : otherwise;
  };
  Scalars s;
  s.is_bf16 = get("bf16", true);
  std::tie(s.h_scale, s.up_scale) = get("scale", std::pair<float, float>{1.0f, 1.0f});
  s.masked_scale = get("masked_scale", s.up_scale);
  s.threshold = get("threshold", 0u);
  s.seed = get("seed", std::vector<int64_t>{});
  s.target = {get("compute", 90), get("multiprocessors", 4), get("sm90a", true)};
  s.form = get("form", std::string());
  s.request = {get("tile_n", 0), get("group", 0)};
  s.chain = get("chain", 0u);
  s.decode = {get("rows", 0), get("decode_n", 0), get("splits", 0)};
  s.options = options_of(get("schedule", uint64_t{0}), get("timing", std::string("random")),
                         get("resident_blocks", 1 << 20));
  return s;
}

inline Matrix row_of(const std::optional<Array>& bias, const Scalars& s) {
  const Dtype dtype = s.is_bf16 ? Dtype::bf16 : Dtype::f16;
  if (!bias) return {nullptr, 0, 0, dtype};
  return {const_cast<uint16_t*>(bias->data()), 0, bias->strides(0) / 2, dtype};
}

inline void add_inputs(const std::vector<std::pair<std::string, Array>>& inputs,
                       const std::optional<Array>& bias) {
  for (const auto& [name, array] : inputs) add_buffer(name, array, emu::Use::input);
  if (bias && bias->size() > 0)
    emu::global.add("bias", const_cast<uint16_t*>(bias->data()),
                    static_cast<uint64_t>((bias->shape(0) - 1) * bias->strides(0) + 2),
                    emu::Use::input);
}

// Memory for a call, poisoned.
struct Workspace {
  std::vector<uint8_t> bytes;
  uint8_t* begin = nullptr;

  Workspace(int64_t size, int64_t sync_offset, int64_t sync_bytes)
      : bytes(size + 128, emu::kPoison) {
    begin = bytes.data() + (128 - reinterpret_cast<uintptr_t>(bytes.data()) % 128) % 128;
    if (sync_offset + sync_bytes > size) throw emu::Error("the workspace is too small");
    const int64_t others = sync_bytes > 0 ? sync_offset : size;
    if (others > 0) emu::global.add("workspace", begin, others, emu::Use::output);
    if (sync_bytes > 0)
      emu::global.add("sync", begin + sync_offset, sync_bytes, emu::Use::workspace);
  }
};

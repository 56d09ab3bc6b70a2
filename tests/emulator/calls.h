// Calls on numpy arrays as arguments of kernels.
#pragma once
#include "arrays.h"

inline DownProjArgs down_proj_args(const Array& x, const Array& down, const Array& h, bool is_bf16,
                                   const std::vector<int64_t>& seed, uint32_t threshold,
                                   float scale) {
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

inline FusedGemmArgs fused_gemm_args(const Array& x, const Array& weight, const Array& h,
                                     const Array& up, const std::optional<Array>& bias,
                                     const Array& y, const Scalars& s) {
  if (x.shape(1) != weight.shape(1) || y.shape(0) != x.shape(0) || y.shape(1) != weight.shape(0) ||
      h.shape(0) != x.shape(0) || up.shape(0) != weight.shape(0) || h.shape(1) != up.shape(1))
    throw py::value_error("x, weight, h, up and y do not fit together");
  const auto m = [&](const Array& a) { return matrix_of(a, s.is_bf16); };
  return {m(x),       m(weight),       m(h),       m(up),      row_of(bias, s), m(y),
          x.shape(0), weight.shape(0), x.shape(1), h.shape(1), s.up_scale,      {}};
}

inline ForwardArgs forward_args(const Array& x, const Array& weight, const Array& a, const Array& b,
                                const std::optional<Array>& bias, const Array& y, const Array& h,
                                const Scalars& s) {
  return {down_proj_args(x, a, h, s.is_bf16, s.seed, s.threshold, s.h_scale),
          fused_gemm_args(x, weight, h, b, bias, y, s)};
}

// Gradients may be of fp32; None is one that is not wanted.
using Result = std::optional<py::array>;

inline Matrix result_of(const Result& a, bool is_bf16) {
  const Dtype narrow = is_bf16 ? Dtype::bf16 : Dtype::f16;
  if (!a) return {nullptr, 0, 0, narrow};
  const int64_t size = a->itemsize();
  const int64_t rows = a->ndim() == 2 ? a->strides(0) / size : 0;
  return {const_cast<void*>(a->data()), rows, a->strides(a->ndim() - 1) / size,
          size == 4 ? Dtype::f32 : narrow};
}

inline void add_result(const std::string& name, const Result& a) {
  if (!a || a->size() == 0) return;
  int64_t bytes = a->itemsize();
  for (int i = 0; i < a->ndim(); ++i) bytes += (a->shape(i) - 1) * a->strides(i);
  emu::global.add(name, const_cast<void*>(a->data()), static_cast<uint64_t>(bytes),
                  emu::Use::output);
}

struct __attribute__((visibility("hidden"))) Results {  // as the types of pybind11 are
  Result dx, da, db, dbias;
};

inline Results results_of(const py::dict& given) {
  const auto get = [&](const char* name) {
    return given.contains(name) && !given[name].is_none() ? Result(given[name].cast<py::array>())
                                                          : Result();
  };
  return {get("dx"), get("da"), get("db"), get("dbias")};
}

inline Dropout dropout_of(const Scalars& s) {
  return {s.seed.empty() ? nullptr : s.seed.data(), static_cast<int>(s.seed.size()), s.threshold};
}

inline BackwardArgs backward_args(const std::vector<Array>& operands, const Results& to,
                                  const Scalars& s) {
  const Array &dy = operands[0], &x = operands[1], &weight = operands[2], &a = operands[3],
              &b = operands[4], &h = operands[5];
  if (x.shape(0) != dy.shape(0) || h.shape(0) != dy.shape(0) || weight.shape(0) != dy.shape(1) ||
      weight.shape(1) != x.shape(1) || a.shape(1) != x.shape(1) || b.shape(0) != dy.shape(1) ||
      h.shape(1) != a.shape(0) || b.shape(1) != a.shape(0))
    throw py::value_error("dy, x, weight, A, B and h do not fit together");
  const auto m = [&](const Array& v) { return matrix_of(v, s.is_bf16); };
  const auto out = [&](const Result& v) { return result_of(v, s.is_bf16); };
  return {m(dy),
          m(x),
          m(weight),
          m(a),
          m(b),
          m(h),
          out(to.dx),
          out(to.da),
          out(to.db),
          out(to.dbias),
          to.dx.has_value(),
          to.da.has_value(),
          to.db.has_value(),
          to.dbias.has_value(),
          dy.shape(0),
          dy.shape(1),
          x.shape(1),
          a.shape(0),
          s.h_scale,
          s.up_scale,
          s.masked_scale,
          dropout_of(s)};
}

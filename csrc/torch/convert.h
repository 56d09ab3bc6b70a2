// Tensor -> kernel arguments, and the checks that keep a direct call of an op from crashing.
// The messages a user of fused_lora_linear sees come from lora_kernels/checks.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../philox.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
}

// A [rows, cols] tensor as it lies in memory.
inline Matrix matrix(const Tensor& t, const char* op, const char* name, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op, ": ", name, " must be [",
                  rows, ", ", cols, "]");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), dtype_of(t, op, name)};
}

inline Matrix transposed(const Matrix& m) { return {m.data, m.col_stride, m.row_stride, m.dtype}; }

inline Dropout dropout_of(const OptionalTensor& seed, int64_t threshold, const char* op) {
  if (!seed.has_value()) return {nullptr, 0, 0};
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->dim() == 1 && seed->is_contiguous() &&
                      (seed->size(0) == 2 || seed->size(0) == 4),
                  op, ": seed must be a contiguous int64 tensor [2] or [4]");
  STD_TORCH_CHECK(threshold >= 0 && threshold <= kMaskRange, op, ": threshold must be in 0..", kMaskRange);
  return {static_cast<const int64_t*>(seed->const_data_ptr()), static_cast<int>(seed->size(0)),
          static_cast<uint32_t>(threshold)};
}

// 1/q of the mask: the factor that dropout multiplies the survivors by.
inline double inverse_keep(const Dropout& d) {
  return d.seed == nullptr ? 1.0 : double(kMaskRange) / double(kMaskRange - d.threshold);
}

inline std::vector<int64_t> sizes(const Tensor& t) {
  std::vector<int64_t> result(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) result[i] = t.size(i);
  return result;
}

// [..., width] -> [rows, width]; a view wherever the strides allow one.
inline Tensor flatten_rows(const Tensor& t) {
  if (t.dim() == 2) return t;
  STD_TORCH_CHECK(t.dim() >= 1, "lora_kernels: expected at least one dimension");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return torch::stable::reshape(t, std::vector<int64_t>{rows, t.size(t.dim() - 1)});
}

// A contiguous [..., width] tensor with the leading dimensions of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t width) {
  std::vector<int64_t> shape = sizes(like);
  shape.back() = width;
  return torch::stable::new_empty(like, shape);
}

}  // namespace lora_kernels

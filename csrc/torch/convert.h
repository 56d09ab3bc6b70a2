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

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::f32 ? "float32" : dtype == Dtype::bf16 ? "bfloat16" : "float16";
}

inline Dtype dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
}

// The memory of t, which must be there: FSDP frees that of a parameter whose sizes stay.
inline void* data_of(const Tensor& t, const char* op, const char* name) {
  int64_t bytes, end = t.storage_offset() + 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return nullptr;
    end += (t.size(i) - 1) * t.stride(i);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(end * static_cast<int64_t>(t.element_size()) <= bytes, op, ": ", name,
                  " lies beyond its storage of ", bytes,
                  " bytes, which was freed or cut; unshard the parameter first");
  return const_cast<void*>(t.const_data_ptr());
}

// A matrix in memory together with the tensor that owns it.
struct Operand {
  Tensor tensor;
  Matrix matrix;
  int64_t rows, cols;
};

inline Operand transposed(const Operand& a) {
  const Matrix& m = a.matrix;
  return {a.tensor, {m.data, m.col_stride, m.row_stride, m.dtype}, a.cols, a.rows};
}

inline Operand operand(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions, but has ", t.dim());
  const Matrix matrix{data_of(t, op, name), t.stride(0), t.stride(1), dtype_of(t, op, name)};
  return {t, matrix, t.size(0), t.size(1)};
}

// [..., width] as [rows, width]: in place where the leading strides allow it, else a copy.
inline Operand flatten_rows(const Tensor& t, const char* op, const char* name) {
  const int64_t dim = t.dim();
  if (dim == 2) return operand(t, op, name);
  STD_TORCH_CHECK(dim >= 1, op, ": ", name, " must have at least one dimension");
  const int64_t width = t.size(dim - 1);
  int64_t rows = 1, row_stride = width;
  bool in_place = true;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (t.size(i) != 1) {
      if (rows == 1) row_stride = t.stride(i);
      in_place = in_place && t.stride(i) == rows * row_stride;
    }
    rows *= t.size(i);
  }
  if (in_place || rows == 0) {
    const Matrix matrix{data_of(t, op, name), row_stride, t.stride(dim - 1), dtype_of(t, op, name)};
    return {t, matrix, rows, width};
  }
  return operand(torch::stable::reshape(t, std::vector<int64_t>{rows, width}), op, name);
}

inline void check_size(int64_t got, int64_t expected, const char* op, const char* what) {
  STD_TORCH_CHECK(got == expected, op, ": ", what, " is ", got, " but must be ", expected);
}

inline Dropout dropout_of(const OptionalTensor& seed, int64_t threshold, const char* op) {
  if (!seed.has_value()) return {nullptr, 0, 0};
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->dim() == 1 &&
                      seed->is_contiguous() && (seed->size(0) == 2 || seed->size(0) == 4),
                  op, ": seed must be a contiguous int64 tensor [2] or [4]");
  STD_TORCH_CHECK(threshold >= 0 && threshold <= kMaskRange, op, ": threshold must be in 0..",
                  kMaskRange);
  return {static_cast<const int64_t*>(data_of(*seed, op, "seed")), static_cast<int>(seed->size(0)),
          static_cast<uint32_t>(threshold)};
}

// x [M, K], weight [N, K], h [M, r], up [N, r].
inline void check_gemm(const Operand& x, const Operand& weight, const Operand& h, const Operand& up,
                       const char* op) {
  check_size(weight.cols, x.cols, op, "weight.size(1)");
  check_size(h.rows, x.rows, op, "h.size(0)");
  check_size(up.rows, weight.rows, op, "up.size(0)");
  check_size(up.cols, h.cols, op, "up.size(1)");
  const auto same = [&](const Operand& o, const char* name) {
    STD_TORCH_CHECK(o.matrix.dtype == x.matrix.dtype, op, ": ", name, " has dtype ",
                    name_of(o.matrix.dtype), " but must have that of x, ", name_of(x.matrix.dtype));
  };
  same(weight, "weight"), same(h, "h"), same(up, "up");
}

// A bias [N] as a matrix of one row, without data if there is none.
inline Matrix bias_row(const OptionalTensor& bias, int64_t N, Dtype dtype, const char* op) {
  if (!bias.has_value()) return {nullptr, 0, 0, dtype};
  STD_TORCH_CHECK(bias->dim() == 1, op, ": bias must have one dimension, but has ", bias->dim());
  check_size(bias->size(0), N, op, "bias.size(0)");
  STD_TORCH_CHECK(dtype_of(*bias, op, "bias") == dtype, op, ": bias has dtype ",
                  name_of(dtype_of(*bias, op, "bias")), " but must have that of x, ",
                  name_of(dtype));
  return {data_of(*bias, op, "bias"), 0, bias->stride(0), dtype};
}

// The sizes of x with the last one replaced.
inline std::vector<int64_t> sizes_of_y(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim() - 1; ++i) sizes[i] = x.size(i);
  sizes.back() = N;
  return sizes;
}

// 1/q of the mask: the factor that dropout multiplies the survivors by. Nothing survives q = 0.
inline double inverse_keep(const Dropout& d) {
  if (d.seed == nullptr || d.threshold == kMaskRange) return 1.0;
  return double(kMaskRange) / double(kMaskRange - d.threshold);
}

}  // namespace lora_kernels

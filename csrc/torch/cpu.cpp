// The CPU ops: frozen products by the vendor's GEMM, everything LoRA by csrc/cpu.
#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../cpu/kernels.h"
#include "aten.h"
#include "convert.h"

namespace lora_kernels {
namespace {

using cpu::kColUnit;
using cpu::kernels;
using cpu::kRowUnit;

constexpr int64_t kTaskFlops = 1 << 17;         // below this a second thread costs more than it saves
constexpr int64_t kPanelElements = 1 << 22;     // of an fp32 copy of a 16-bit operand: 16 MiB

// f(begin, end) over 0..extent in ranges that start at multiples of unit.
template <class F>
void parallel(int64_t extent, int64_t unit, int64_t flops_per_unit, const F& f) {
  const int64_t units = (extent + unit - 1) / unit;
  const int64_t grain = std::max<int64_t>(1, kTaskFlops / std::max<int64_t>(1, flops_per_unit));
  if (units <= grain) return f(int64_t{0}, extent);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    f(begin * unit, std::min(end * unit, extent));
  });
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  Tensor mask = torch::stable::empty({rows, cols}, ScalarType::Bool);
  DropoutMaskArgs args{static_cast<bool*>(mask.mutable_data_ptr()), rows, cols,
                       dropout_of(seed, threshold, "dropout_mask")};
  parallel(rows, 16, 16 * 8 * cols,
           [&](int64_t begin, int64_t end) { kernels().dropout_mask(args, begin, end); });
  return mask;
}

Tensor down_proj(const Tensor& x, const Tensor& down, const OptionalTensor& seed, int64_t threshold,
                 double scale) {
  NoGrad no_grad;
  const Tensor rows = flatten_rows(x);
  const int64_t M = rows.size(0), K = rows.size(1), r = down.size(0);
  Tensor h = torch::stable::new_empty(rows, std::vector<int64_t>{M, r});
  const Dropout dropout = dropout_of(seed, threshold, "down_proj");
  DownProjArgs args{matrix(rows, "down_proj", "x", M, K),
                    matrix(down, "down_proj", "down", r, K),
                    matrix(h, "down_proj", "h", M, r),
                    M, K, r,
                    static_cast<float>(scale * inverse_keep(dropout)),
                    dropout};
  parallel(M, kRowUnit, 2 * kRowUnit * K * std::max<int64_t>(r, 4),
           [&](int64_t begin, int64_t end) { kernels().down_proj(args, begin, end); });
  return h;
}

// Adds the rank-r term and bias to a part of the frozen product, and rounds it into y.
void epilogue(const FusedGemmArgs& args, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const int64_t work = 2 * (args.r + 2);
  if (cols >= rows) {
    parallel(cols, kColUnit, kColUnit * rows * work, [&](int64_t begin, int64_t end) {
      kernels().fused_gemm(args, row, row + rows, col + begin, col + end);
    });
  } else {
    parallel(rows, kRowUnit, kRowUnit * cols * work, [&](int64_t begin, int64_t end) {
      kernels().fused_gemm(args, row + begin, row + end, col, col + cols);
    });
  }
}

// fp32: the vendor writes y and adds the rank-r term to it; under a mask the epilogue adds it.
void fused_gemm_f32(FusedGemmArgs& args, const Tensor& x, const Tensor& weight, const Tensor& h,
                    const Tensor& up, const OptionalTensor& bias, const Tensor& y, double scale) {
  const Tensor weight_t = torch::stable::transpose(weight, 0, 1);
  if (args.dropout.seed != nullptr) {
    mm_out(y, x, weight_t);
    args.product = args.y;
    return epilogue(args, 0, args.M, 0, args.N);
  }
  if (bias.has_value())
    addmm_out(y, *bias, x, weight_t, 1.0);
  else
    mm_out(y, x, weight_t);
  if (args.r > 0) addmm_out(y, y, h, torch::stable::transpose(up, 0, 1), scale);
}

// 16 bits: panels of both operands go to fp32 and through the vendor's fp32 GEMM, so the rank-r term
// meets an unrounded product. Processors with 16-bit GEMM instructions take `composed` instead.
void fused_gemm_16bit(FusedGemmArgs& args, const Tensor& x, const Tensor& weight) {
  const int64_t K = x.size(1);
  const int64_t row_panel = std::clamp<int64_t>(kPanelElements / std::max<int64_t>(K, 1), 128, 4096);
  const int64_t col_panel =
      std::clamp<int64_t>(kPanelElements / std::max(K, row_panel), kColUnit, 4096) / kColUnit * kColUnit;
  for (int64_t row = 0; row < args.M; row += row_panel) {
    const int64_t rows = std::min(row_panel, args.M - row);
    Tensor x_panel = torch::stable::narrow(const_cast<Tensor&>(x), 0, row, rows);
    x_panel = torch::stable::to(x_panel, ScalarType::Float);
    for (int64_t col = 0; col < args.N; col += col_panel) {
      const int64_t cols = std::min(col_panel, args.N - col);
      Tensor w_panel = torch::stable::narrow(const_cast<Tensor&>(weight), 0, col, cols);
      w_panel = torch::stable::to(w_panel, ScalarType::Float);
      Tensor product = torch::stable::new_empty(x_panel, std::vector<int64_t>{rows, cols});
      mm_out(product, x_panel, torch::stable::transpose(w_panel, 0, 1));
      args.product = matrix(product, "fused_gemm", "product", rows, cols);
      args.product_row = row, args.product_col = col;
      epilogue(args, row, rows, col, cols);
    }
  }
}

Tensor fused_gemm(const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& up,
                  const OptionalTensor& bias, const OptionalTensor& seed, int64_t threshold,
                  double scale) {
  NoGrad no_grad;
  const char* op = "fused_gemm";
  const Tensor rows = flatten_rows(x);
  const int64_t M = rows.size(0), K = rows.size(1), N = weight.size(0), r = h.size(1);
  matrix(weight, op, "weight", N, K);
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), op, ": x and weight must share a dtype");
  Tensor y = empty_rows(x, N);
  Tensor y_rows = torch::stable::view(y, std::vector<int64_t>{M, N});
  Matrix bias_row{nullptr, 0, 0, Dtype::f32};
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, op, ": bias must be [", N, "]");
    bias_row = {const_cast<void*>(bias->const_data_ptr()), 0, bias->stride(0), dtype_of(*bias, op, "bias")};
  }
  const Dropout dropout = dropout_of(seed, threshold, op);
  FusedGemmArgs args{{}, 0, 0,
                     matrix(h, op, "h", M, r),
                     matrix(up, op, "up", N, r),
                     bias_row,
                     matrix(y_rows, op, "y", M, N),
                     M, N, r,
                     static_cast<float>(scale * inverse_keep(dropout)),
                     dropout};
  if (args.y.dtype == Dtype::f32)
    fused_gemm_f32(args, rows, weight, h, up, bias, y_rows, scale);
  else
    fused_gemm_16bit(args, rows, weight);
  return y;
}

Tensor weight_grad(const Tensor& h, const Tensor& x, const OptionalTensor& seed, int64_t threshold,
                   double scale, ScalarType dtype, bool transpose) {
  NoGrad no_grad;
  const Tensor rows = flatten_rows(x);
  const int64_t M = rows.size(0), K = rows.size(1), r = h.size(1);
  Tensor grad = torch::stable::empty(transpose ? std::vector<int64_t>{K, r} : std::vector<int64_t>{r, K},
                                     dtype);
  const Matrix out = matrix(grad, "weight_grad", "grad", grad.size(0), grad.size(1));
  const Dropout dropout = dropout_of(seed, threshold, "weight_grad");
  WeightGradArgs args{matrix(h, "weight_grad", "h", M, r),
                      matrix(rows, "weight_grad", "x", M, K),
                      transpose ? transposed(out) : out,
                      M, K, r,
                      static_cast<float>(scale * inverse_keep(dropout)),
                      dropout};
  parallel(K, kColUnit, 2 * kColUnit * M * std::max<int64_t>(r, 4),
           [&](int64_t begin, int64_t end) { kernels().weight_grad(args, begin, end); });
  return grad;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                   const Tensor& lora_b, const OptionalTensor& bias,
                                   const OptionalTensor& seed, int64_t threshold, double h_scale,
                                   double up_scale) {
  Tensor h = down_proj(x, lora_a, seed, threshold, h_scale);
  Tensor y = fused_gemm(x, weight, h, lora_b, bias, std::nullopt, 0, up_scale);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& h, const OptionalTensor& seed, int64_t threshold, double h_scale, double up_scale,
    ScalarType a_dtype, ScalarType b_dtype, bool need_x, bool need_a, bool need_b, bool need_bias) {
  NoGrad no_grad;
  const Tensor dy_rows = flatten_rows(dy);
  Tensor dx = torch::stable::empty({0}, x.scalar_type()), da = dx, db = dx, dbias = dx;
  auto t = [](const Tensor& m) { return torch::stable::transpose(m, 0, 1); };

  if (need_x || need_a) {
    const Tensor dh = down_proj(dy_rows, t(lora_b), std::nullopt, 0, h_scale);
    if (need_x) dx = fused_gemm(dy, t(weight), dh, t(lora_a), std::nullopt, seed, threshold, up_scale);
    if (need_a) da = weight_grad(dh, x, seed, threshold, up_scale, a_dtype, false);
  }
  if (need_b) db = weight_grad(h, dy_rows, std::nullopt, 0, up_scale, b_dtype, true);
  if (need_bias) dbias = torch::stable::sum(dy_rows, std::vector<int64_t>{0});
  return {dx, da, db, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
  m.impl("down_proj", TORCH_BOX(&down_proj));
  m.impl("fused_gemm", TORCH_BOX(&fused_gemm));
  m.impl("weight_grad", TORCH_BOX(&weight_grad));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace lora_kernels

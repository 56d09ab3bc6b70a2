// The CPU ops: frozen products by the vendor's fp32 GEMM, everything LoRA by csrc/cpu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "aten.h"
#include "convert.h"

namespace lora_kernels {
namespace {

using cpu::FusedGemmTailArgs;
using cpu::kColUnit;
using cpu::kernels;
using cpu::kRowUnit;

constexpr int64_t kTaskFlops = 1 << 17;  // below this a second thread costs more than it saves
constexpr int64_t kSmallFlops =
    1 << 18;  // below this the vendor's call overhead outweighs its GEMM
constexpr int64_t kPanelElements = 1 << 22;  // of an fp32 copy of a 16-bit operand: 16 MiB

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

// ---- down_proj ----------------------------------------------------------------------------------

Tensor as_tensor(const Operand& a) {
  return view_2d(a.tensor, a.rows, a.cols, a.matrix.row_stride, a.matrix.col_stride);
}

// A few rows of undropped fp32: our panels are packed for dozens of rows, the vendor's GEMM is not.
bool few_rows(const Operand& x, int64_t r, const Dropout& dropout) {
  return x.matrix.dtype == Dtype::f32 && dropout.seed == nullptr && x.rows < kRowUnit &&
         2 * x.rows * x.cols * r >= kTaskFlops;
}

void run_down_proj(const DownProjArgs& args) {
  parallel(args.M, kRowUnit, 2 * kRowUnit * args.K * std::max<int64_t>(args.r, 4),
           [&](int64_t begin, int64_t end) { kernels().down_proj(args, begin, end); });
}

Operand down_proj(const Operand& x, const Operand& down, const Dropout& dropout, double scale) {
  check_size(down.cols, x.cols, "down_proj", "down.size(1)");
  Operand h = operand(empty_cpu({x.rows, down.rows}, x.tensor.scalar_type()), "down_proj", "h");
  if (few_rows(x, down.rows, dropout) && down.matrix.dtype == Dtype::f32) {
    addmm_out(h.tensor, h.tensor, as_tensor(x), as_tensor(transposed(down)), 0.0, scale);
    return h;
  }
  run_down_proj({x.matrix, down.matrix, h.matrix, x.rows, x.cols, down.rows,
                 static_cast<float>(scale * inverse_keep(dropout)), dropout});
  return h;
}

// ---- fused_gemm ---------------------------------------------------------------------------------

// Adds the rank-r term and bias to a part of the frozen product, and rounds it into y.
void epilogue(const FusedGemmTailArgs& args, int64_t row, int64_t rows, int64_t col, int64_t cols) {
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

// Small: the microkernel multiplies too, so no call leaves this library.
void fused_gemm_small(FusedGemmTailArgs& args, const Operand& x, const Operand& weight) {
  std::vector<float> product;
  args.product = args.y;
  if (args.y.dtype != Dtype::f32) {
    product.resize(args.M * args.N);
    args.product = {product.data(), args.N, 1, Dtype::f32};
  }
  kernels().down_proj({x.matrix, weight.matrix, args.product, args.M, x.cols, args.N, 1.0f, {}}, 0,
                      args.M);
  kernels().fused_gemm(args, 0, args.M, 0, args.N);
}

// fp32: the vendor writes y and adds the rank-r term to it; under a mask the epilogue adds it.
void fused_gemm_f32(FusedGemmTailArgs& args, const Operand& x, const Operand& weight,
                    const Operand& h, const Operand& up, const OptionalTensor& bias,
                    const Tensor& y) {
  const Tensor x_t = as_tensor(x), weight_t = as_tensor(transposed(weight));
  if (args.dropout.seed != nullptr) {
    mm_out(y, x_t, weight_t);
    args.product = args.y;
    return epilogue(args, 0, args.M, 0, args.N);
  }
  if (bias.has_value())
    addmm_out(y, *bias, x_t, weight_t, 1.0, 1.0);
  else
    mm_out(y, x_t, weight_t);
  if (args.r > 0) addmm_out(y, y, as_tensor(h), as_tensor(transposed(up)), 1.0, args.scale);
}

// rows [begin, begin + count) of a 16-bit operand, in fp32.
Tensor fp32_rows(const Operand& a, int64_t begin, int64_t count) {
  const Matrix& m = a.matrix;
  const Tensor rows =
      view_2d(a.tensor, count, a.cols, m.row_stride, m.col_stride, begin * m.row_stride);
  return torch::stable::to(rows, ScalarType::Float);
}

// 16 bits: panels of both operands go to fp32 and through the vendor's fp32 GEMM, so the rank-r
// term meets an unrounded product. Processors with 16-bit GEMM instructions take `composed`
// instead.
void fused_gemm_16bit(FusedGemmTailArgs& args, const Operand& x, const Operand& weight) {
  const int64_t K = std::max<int64_t>(x.cols, 1);
  const int64_t row_panel = std::clamp<int64_t>(kPanelElements / K, 128, 4096);
  const int64_t col_panel =
      std::clamp<int64_t>(kPanelElements / std::max(K, row_panel) / kColUnit, 1, 64) * kColUnit;
  for (int64_t row = 0; row < args.M; row += row_panel) {
    const int64_t rows = std::min(row_panel, args.M - row);
    const Tensor x_panel = fp32_rows(x, row, rows);
    for (int64_t col = 0; col < args.N; col += col_panel) {
      const int64_t cols = std::min(col_panel, args.N - col);
      const Tensor w_panel = fp32_rows(weight, col, cols);
      const Operand product =
          operand(empty_cpu({rows, cols}, ScalarType::Float), "fused_gemm", "product");
      mm_out(product.tensor, x_panel, torch::stable::transpose(w_panel, 0, 1));
      args.product = product.matrix;
      args.product_row = row, args.product_col = col;
      epilogue(args, row, rows, col, cols);
    }
  }
}

// y [..., N], where x_shape gives the leading dimensions.
Tensor fused_gemm(const Tensor& x_shape, const Operand& x, const Operand& weight, const Operand& h,
                  const Operand& up, const OptionalTensor& bias, const Dropout& dropout,
                  double scale) {
  const char* op = "fused_gemm";
  const int64_t M = x.rows, N = weight.rows, r = h.cols;
  check_gemm(x, weight, h, up, op);
  const Dtype dtype = x.matrix.dtype;
  const Matrix bias_matrix = bias_row(bias, N, dtype, op);
  const std::vector<int64_t> sizes = sizes_of_y(x_shape, N);
  Tensor y = empty_cpu(sizes.data(), x_shape.dim(), x.tensor.scalar_type());
  if (M == 0 || N == 0) return y;
  const Matrix y_rows{y.mutable_data_ptr(), N, 1, x.matrix.dtype};
  FusedGemmTailArgs args{{},
                         0,
                         0,
                         h.matrix,
                         up.matrix,
                         bias_matrix,
                         y_rows,
                         M,
                         N,
                         r,
                         static_cast<float>(scale * inverse_keep(dropout)),
                         dropout};
  if (2 * M * N * x.cols <= kSmallFlops)
    fused_gemm_small(args, x, weight);
  else if (dtype == Dtype::f32)
    fused_gemm_f32(args, x, weight, h, up, bias, view_2d(y, M, N, N, 1));
  else
    fused_gemm_16bit(args, x, weight);
  return y;
}

// ---- weight_grad --------------------------------------------------------------------------------

void run_weight_grad(const WeightGradArgs& args) {
  parallel(args.K, kColUnit, 2 * kColUnit * args.M * std::max<int64_t>(args.r, 4),
           [&](int64_t begin, int64_t end) { kernels().weight_grad(args, begin, end); });
}

Tensor weight_grad(const Operand& h, const Operand& x, const Dropout& dropout, double scale,
                   bool wide, bool transpose) {
  check_size(h.rows, x.rows, "weight_grad", "h.size(0)");
  const int64_t r = h.cols, K = x.cols;
  const ScalarType dtype = wide ? ScalarType::Float : x.tensor.scalar_type();
  Operand grad = operand(transpose ? empty_cpu({K, r}, dtype) : empty_cpu({r, K}, dtype),
                         "weight_grad", "grad");
  if (few_rows(x, r, dropout) && h.matrix.dtype == Dtype::f32) {
    const Operand &left = transpose ? x : h, &right = transpose ? h : x;
    addmm_out(grad.tensor, grad.tensor, as_tensor(transposed(left)), as_tensor(right), 0.0, scale);
    return grad.tensor;
  }
  run_weight_grad({h.matrix, x.matrix, transpose ? transposed(grad).matrix : grad.matrix, x.rows, K,
                   r, static_cast<float>(scale * inverse_keep(dropout)), dropout});
  return grad.tensor;
}

// dbias [N] = column sums of dy: a weight gradient whose h is a column of ones.
Tensor column_sums(const Operand& dy) {
  static float one = 1.0f;
  Tensor sums = empty_cpu({dy.cols}, dy.tensor.scalar_type());
  const Matrix row{sums.mutable_data_ptr(), dy.cols, 1, dy.matrix.dtype};
  run_weight_grad({{&one, 0, 0, Dtype::f32}, dy.matrix, row, dy.rows, dy.cols, 1, 1.0f, {}});
  return sums;
}

// ---- the operators ------------------------------------------------------------------------------

Tensor dropout_mask_op(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  Tensor mask = empty_cpu({rows, cols}, ScalarType::Bool);
  DropoutMaskArgs args{static_cast<bool*>(mask.mutable_data_ptr()), rows, cols,
                       dropout_of(seed, threshold, "dropout_mask")};
  parallel(rows, 16, 16 * 8 * cols,
           [&](int64_t begin, int64_t end) { kernels().dropout_mask(args, begin, end); });
  return mask;
}

Tensor down_proj_op(const Tensor& x, const Tensor& down, const OptionalTensor& seed,
                    int64_t threshold, double scale) {
  return down_proj(flatten_rows(x, "down_proj", "x"), operand(down, "down_proj", "down"),
                   dropout_of(seed, threshold, "down_proj"), scale)
      .tensor;
}

Tensor fused_gemm_op(const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& up,
                     const OptionalTensor& bias, const OptionalTensor& seed, int64_t threshold,
                     double scale) {
  NoGrad no_grad;
  const char* op = "fused_gemm";
  return fused_gemm(x, flatten_rows(x, op, "x"), operand(weight, op, "weight"), operand(h, op, "h"),
                    operand(up, op, "up"), bias, dropout_of(seed, threshold, op), scale);
}

Tensor weight_grad_op(const Tensor& h, const Tensor& x, const OptionalTensor& seed,
                      int64_t threshold, double scale, bool wide, bool transpose) {
  return weight_grad(operand(h, "weight_grad", "h"), flatten_rows(x, "weight_grad", "x"),
                     dropout_of(seed, threshold, "weight_grad"), scale, wide, transpose);
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                      const Tensor& lora_b, const OptionalTensor& bias,
                                      const OptionalTensor& seed, int64_t threshold, double h_scale,
                                      double up_scale) {
  NoGrad no_grad;
  const char* op = "forward";
  const Operand x_rows = flatten_rows(x, op, "x");
  const Operand h =
      down_proj(x_rows, operand(lora_a, op, "lora_a"), dropout_of(seed, threshold, op), h_scale);
  Tensor y = fused_gemm(x, x_rows, operand(weight, op, "weight"), h, operand(lora_b, op, "lora_b"),
                        bias, {}, up_scale);
  return {y, h.tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const OptionalTensor& seed, int64_t threshold,
    double h_scale, double up_scale, bool wide_a, bool wide_b, bool need_x, bool need_a,
    bool need_b, bool need_bias) {
  NoGrad no_grad;
  const char* op = "backward";
  const Operand dy_rows = flatten_rows(dy, op, "dy"), a = operand(lora_a, op, "lora_a");
  const Operand b = operand(lora_b, op, "lora_b");
  const Dropout dropout = dropout_of(seed, threshold, op);
  // Every output is a tensor of its own: results of an op must not share memory.
  auto none = [&] { return empty_cpu({0}, x.scalar_type()); };

  Operand dh{};
  if (need_x || need_a) dh = down_proj(dy_rows, transposed(b), {}, h_scale);
  Tensor dx = need_x ? fused_gemm(dy, dy_rows, transposed(operand(weight, op, "weight")), dh,
                                  transposed(a), std::nullopt, dropout, up_scale)
                     : none();
  Tensor da =
      need_a ? weight_grad(dh, flatten_rows(x, op, "x"), dropout, up_scale, wide_a, false) : none();
  Tensor db =
      need_b ? weight_grad(operand(h, op, "h"), dy_rows, {}, up_scale, wide_b, true) : none();
  Tensor dbias = need_bias ? column_sums(dy_rows) : none();
  return {dx, da, db, dbias};
}

// Which copy of the CPU kernels this processor runs.
std::string cpu_isa_op() { return kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa_op));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask_op));
  m.impl("down_proj", TORCH_BOX(&down_proj_op));
  m.impl("fused_gemm", TORCH_BOX(&fused_gemm_op));
  m.impl("weight_grad", TORCH_BOX(&weight_grad_op));
  m.impl("forward", TORCH_BOX(&forward_op));
  m.impl("backward", TORCH_BOX(&backward_op));
}

}  // namespace lora_kernels

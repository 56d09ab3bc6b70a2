// down_proj, fused_gemm and weight_grad on CPUs: frozen products by the vendor's GEMM, everything
// LoRA by csrc/cpu.
#include "cpu_call.h"

#include <atomic>

namespace lora_kernels::cpu {

constexpr int64_t kPanelElements = 1 << 22;  // of an fp32 copy of a 16-bit operand: 16 MiB
// What a group takes of x at a time: blocks of the kernels' own size, so they pack as often.
constexpr int64_t kRowBlock = 2 * kRowUnit, kColBlock = 4 * kColUnit;

// ---- down_proj ----------------------------------------------------------------------------------

// A few rows of undropped fp32: our panels are packed for dozens of rows, the vendor's GEMM is not.
static bool few_rows(const Operand& x, int64_t r, const Dropout& dropout) {
  return x.matrix.dtype == Dtype::f32 && dropout.seed == nullptr && x.rows < kRowUnit &&
         2 * x.rows * x.cols * r >= kTaskFlops;
}

void run_down_proj(const std::vector<DownProjArgs>& group) {
  if (group.empty()) return;
  int64_t ranks = 0;
  for (const DownProjArgs& args : group) ranks += std::max<int64_t>(args.r, 4);
  parallel(group[0].M, kRowUnit, 2 * kRowUnit * group[0].K * ranks,
           [&](int64_t begin, int64_t end) {
             for (int64_t row = begin; row < end; row += kRowBlock)
               for (const DownProjArgs& args : group)
                 kernels().down_proj(args, row, std::min(row + kRowBlock, end));
           });
}

Operand join_down_proj(std::vector<DownProjArgs>& group, const Operand& x, const Operand& down,
                       const Dropout& dropout, double scale) {
  check_size(down.cols, x.cols, "down_proj", "down.size(1)");
  Operand h = operand(empty_cpu({x.rows, down.rows}, x.tensor.scalar_type()), "down_proj", "h");
  if (h.rows == 0 || h.cols == 0) return h;  // 2^40 rows of nothing are not to be walked
  if (few_rows(x, down.rows, dropout) && down.matrix.dtype == Dtype::f32) {
    addmm_out(h.tensor, h.tensor, as_tensor(x), as_tensor(transposed(down)), 0.0, scale);
    return h;
  }
  group.push_back({x.matrix, down.matrix, h.matrix, x.rows, x.cols, down.rows,
                   static_cast<float>(scale * inverse_keep(dropout)), dropout});
  return h;
}

Operand down_proj(const Operand& x, const Operand& down, const Dropout& dropout, double scale) {
  std::vector<DownProjArgs> alone;
  Operand h = join_down_proj(alone, x, down, dropout, scale);
  run_down_proj(alone);
  return h;
}

// ---- fused_gemm ---------------------------------------------------------------------------------

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
static void fused_gemm_small(FusedGemmTailArgs& args, const Operand& x, const Operand& weight) {
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

static std::atomic<bool> vendor_has_bf16{false}, vendor_has_fp16{false};

bool vendor_multiplies(Dtype dtype) {
  return dtype == Dtype::f32 || (dtype == Dtype::bf16 ? vendor_has_bf16 : vendor_has_fp16);
}

void set_vendor_multiplies(bool bf16, bool fp16) {
  vendor_has_bf16 = bf16;
  vendor_has_fp16 = fp16;
}

// The vendor writes y and adds the rank-r term to it; under a mask the epilogue adds it. In 16 bits
// the frozen product is rounded before that.
static void fused_gemm_vendor(FusedGemmTailArgs& args, const Operand& x, const Operand& weight,
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

Matrix part(const Matrix& m, int64_t row, int64_t col) {
  const int64_t size = m.dtype == Dtype::f32 ? 4 : 2;
  char* data = static_cast<char*>(m.data) + (row * m.row_stride + col * m.col_stride) * size;
  return {data, m.row_stride, m.col_stride, m.dtype};
}

Tensor fp32_rows(const Operand& a, int64_t begin, int64_t count) {
  const Matrix& m = a.matrix;
  const Tensor rows =
      view_2d(a.tensor, count, a.cols, m.row_stride, m.col_stride, begin * m.row_stride);
  return torch::stable::to(rows, ScalarType::Float);
}

std::pair<int64_t, int64_t> panel_of(int64_t depth) {
  depth = std::max<int64_t>(depth, 1);
  const int64_t rows = std::clamp<int64_t>(kPanelElements / depth, 128, 4096);
  const int64_t units = kPanelElements / std::max(depth, rows) / kColUnit;
  return {rows, std::clamp<int64_t>(units, 1, 64) * kColUnit};
}

// 16 bits without instructions for them: panels of both operands go to fp32 and through the
// vendor's fp32 GEMM, so the rank-r term meets an unrounded product.
static void fused_gemm_panels(FusedGemmTailArgs& args, const Operand& x, const Operand& weight) {
  const auto [row_panel, col_panel] = panel_of(x.cols);
  const Matrix y = args.y;
  for (int64_t row = 0; row < args.M; row += row_panel) {
    const int64_t rows = std::min(row_panel, args.M - row);
    const Tensor x_panel = fp32_rows(x, row, rows);
    for (int64_t col = 0; col < args.N; col += col_panel) {
      const int64_t cols = std::min(col_panel, args.N - col);
      const Tensor w_panel = fp32_rows(weight, col, cols);
      const Operand product =
          operand(empty_cpu({rows, cols}, ScalarType::Float), "fused_gemm", "product");
      mm_out(product.tensor, x_panel, torch::stable::transpose(w_panel, 0, 1));
      args.product = product.matrix, args.y = part(y, row, col);
      args.first_row = row, args.first_col = col;
      epilogue(args, row, rows, col, cols);
    }
  }
}

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
  else if (vendor_multiplies(dtype))
    fused_gemm_vendor(args, x, weight, h, up, bias, view_2d(y, M, N, N, 1));
  else
    fused_gemm_panels(args, x, weight);
  return y;
}

// ---- weight_grad --------------------------------------------------------------------------------

void run_weight_grad(const std::vector<WeightGradArgs>& group) {
  if (group.empty()) return;
  int64_t ranks = 0;
  for (const WeightGradArgs& args : group) ranks += std::max<int64_t>(args.r, 4);
  parallel(group[0].K, kColUnit, 2 * kColUnit * group[0].M * ranks,
           [&](int64_t begin, int64_t end) {
             for (int64_t col = begin; col < end; col += kColBlock)
               for (const WeightGradArgs& args : group)
                 kernels().weight_grad(args, col, std::min(col + kColBlock, end));
           });
}

Tensor join_weight_grad(std::vector<WeightGradArgs>& group, const Operand& h, const Operand& x,
                        const Dropout& dropout, double scale, bool wide, bool transpose) {
  check_size(h.rows, x.rows, "weight_grad", "h.size(0)");
  const int64_t r = h.cols, K = x.cols;
  const ScalarType dtype = wide ? ScalarType::Float : x.tensor.scalar_type();
  Operand grad = operand(transpose ? empty_cpu({K, r}, dtype) : empty_cpu({r, K}, dtype),
                         "weight_grad", "grad");
  if (r == 0 || K == 0) return grad.tensor;
  if (few_rows(x, r, dropout) && h.matrix.dtype == Dtype::f32) {
    const Operand &left = transpose ? x : h, &right = transpose ? h : x;
    addmm_out(grad.tensor, grad.tensor, as_tensor(transposed(left)), as_tensor(right), 0.0, scale);
    return grad.tensor;
  }
  group.push_back({h.matrix, x.matrix, transpose ? transposed(grad).matrix : grad.matrix, x.rows, K,
                   r, static_cast<float>(scale * inverse_keep(dropout)), dropout});
  return grad.tensor;
}

Tensor weight_grad(const Operand& h, const Operand& x, const Dropout& dropout, double scale,
                   bool wide, bool transpose) {
  std::vector<WeightGradArgs> alone;
  Tensor grad = join_weight_grad(alone, h, x, dropout, scale, wide, transpose);
  run_weight_grad(alone);
  return grad;
}

Tensor column_sums(const Operand& dy) {
  static float one = 1.0f;
  Tensor sums = empty_cpu({dy.cols}, dy.tensor.scalar_type());
  const Matrix row{sums.mutable_data_ptr(), dy.cols, 1, dy.matrix.dtype};
  run_weight_grad({{{&one, 0, 0, Dtype::f32}, dy.matrix, row, dy.rows, dy.cols, 1, 1.0f, {}}});
  return sums;
}

}  // namespace lora_kernels::cpu

// The CPU ops: frozen products by the vendor's GEMM, everything LoRA by csrc/cpu.
#include <algorithm>
#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "aten.h"
#include "convert.h"
#include "errors.h"
#include "group.h"
#include "library.h"

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
// What a group takes of x at a time: blocks of the kernels' own size, so they pack as often.
constexpr int64_t kRowBlock = 2 * kRowUnit, kColBlock = 4 * kColUnit;

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

// One pass over x, which the group shares: rows meet every projection while a cache holds them.
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

// h, which the vendor fills now, or `run_down_proj` of the group that it joins.
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

std::atomic<bool> vendor_has_bf16{false}, vendor_has_fp16{false};

// Whether the vendor's GEMM takes this dtype as it is, and not by way of fp32.
bool vendor_multiplies(Dtype dtype) {
  return dtype == Dtype::f32 || (dtype == Dtype::bf16 ? vendor_has_bf16 : vendor_has_fp16);
}

// The vendor writes y and adds the rank-r term to it; under a mask the epilogue adds it. In 16 bits
// the frozen product is rounded before that.
void fused_gemm_vendor(FusedGemmTailArgs& args, const Operand& x, const Operand& weight,
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

// The part of m that starts at (row, col).
Matrix part(const Matrix& m, int64_t row, int64_t col) {
  const int64_t size = m.dtype == Dtype::f32 ? 4 : 2;
  char* data = static_cast<char*>(m.data) + (row * m.row_stride + col * m.col_stride) * size;
  return {data, m.row_stride, m.col_stride, m.dtype};
}

// rows [begin, begin + count) of a 16-bit operand, in fp32.
Tensor fp32_rows(const Operand& a, int64_t begin, int64_t count) {
  const Matrix& m = a.matrix;
  const Tensor rows =
      view_2d(a.tensor, count, a.cols, m.row_stride, m.col_stride, begin * m.row_stride);
  return torch::stable::to(rows, ScalarType::Float);
}

// (rows, columns) of y for which fp32 copies of operands of this depth are made at a time.
std::pair<int64_t, int64_t> panel_of(int64_t depth) {
  depth = std::max<int64_t>(depth, 1);
  const int64_t rows = std::clamp<int64_t>(kPanelElements / depth, 128, 4096);
  const int64_t units = kPanelElements / std::max(depth, rows) / kColUnit;
  return {rows, std::clamp<int64_t>(units, 1, 64) * kColUnit};
}

// 16 bits without instructions for them: panels of both operands go to fp32 and through the
// vendor's fp32 GEMM, so the rank-r term meets an unrounded product.
void fused_gemm_panels(FusedGemmTailArgs& args, const Operand& x, const Operand& weight) {
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
  else if (vendor_multiplies(dtype))
    fused_gemm_vendor(args, x, weight, h, up, bias, view_2d(y, M, N, N, 1));
  else
    fused_gemm_panels(args, x, weight);
  return y;
}

// ---- weight_grad --------------------------------------------------------------------------------

// One pass over x, which the group shares: columns meet every h while a cache holds them.
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

// The gradient, which the vendor fills now, or `run_weight_grad` of the group that it joins.
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

// dbias [N] = column sums of dy: a weight gradient whose h is a column of ones.
Tensor column_sums(const Operand& dy) {
  static float one = 1.0f;
  Tensor sums = empty_cpu({dy.cols}, dy.tensor.scalar_type());
  const Matrix row{sums.mutable_data_ptr(), dy.cols, 1, dy.matrix.dtype};
  run_weight_grad({{{&one, 0, 0, Dtype::f32}, dy.matrix, row, dy.rows, dy.cols, 1, 1.0f, {}}});
  return sums;
}

// ---- dx of a group ------------------------------------------------------------------------------

// What one projection adds to dx [M, K]: dy * weight^T + select(mask, scale * dh * up^T, 0).
struct Share {
  Operand dy, weight, dh, up;  // [M, N], [K, N], [M, r], [K, r]
  Dropout dropout;
  double scale;
};

// Its rank-r term, to be added to an fp32 product in place.
FusedGemmTailArgs tail_of(const Share& s, const Matrix& product) {
  return {product,
          0,
          0,
          s.dh.matrix,
          s.up.matrix,
          {nullptr, 0, 0, Dtype::f32},
          product,
          s.dy.rows,
          s.weight.rows,
          s.dh.cols,
          static_cast<float>(s.scale * inverse_keep(s.dropout)),
          s.dropout};
}

// Adds all of them to `sum`, the fp32 part of dx that starts at (row, col), and rounds it into dx.
void add_tails(const std::vector<Share>& shares, const Operand& sum, const Operand& dx, int64_t row,
               int64_t col) {
  for (const Share& s : shares) {
    FusedGemmTailArgs args = tail_of(s, sum.matrix);
    args.first_row = row, args.first_col = col;
    if (&s == &shares.back()) args.y = part(dx.matrix, row, col);
    epilogue(args, row, sum.rows, col, sum.cols);
  }
}

// Small: the microkernel multiplies too, as in `fused_gemm_small`.
void group_dx_small(const std::vector<Share>& shares, const Operand& dx) {
  std::vector<float> sums(dx.rows * dx.cols), product(sums.size());
  for (const Share& s : shares) {
    const Matrix out{product.data(), dx.cols, 1, Dtype::f32};
    kernels().down_proj({s.dy.matrix, s.weight.matrix, out, dx.rows, s.dy.cols, dx.cols, 1.0f, {}},
                        0, dx.rows);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += product[i];
  }
  const Matrix sum{sums.data(), dx.cols, 1, Dtype::f32};
  add_tails(shares, {dx.tensor, sum, dx.rows, dx.cols}, dx, 0, 0);
}

// fp32: the vendor adds up the frozen products in dx, and the rank-r terms that have no mask.
void group_dx_f32(const std::vector<Share>& shares, const Operand& dx) {
  const Tensor& out = dx.tensor;
  double beta = 0.0;
  for (const Share& s : shares) {
    addmm_out(out, out, as_tensor(s.dy), as_tensor(transposed(s.weight)), beta, 1.0);
    beta = 1.0;
  }
  for (const Share& s : shares) {
    if (s.dropout.seed != nullptr)
      epilogue(tail_of(s, dx.matrix), 0, dx.rows, 0, dx.cols);
    else if (s.dh.cols > 0)
      addmm_out(out, out, as_tensor(s.dh), as_tensor(transposed(s.up)), 1.0, s.scale);
  }
}

// The vendor's 16-bit products, each rounded once, are added up in fp32 with the rank-r terms.
void group_dx_16bit(const std::vector<Share>& shares, const Operand& dx) {
  const Tensor product = empty_cpu({dx.rows, dx.cols}, dx.tensor.scalar_type());
  Operand sum = operand(empty_cpu({dx.rows, dx.cols}, ScalarType::Float), "backward_group", "sum");
  for (const Share& s : shares) {
    mm_out(product, as_tensor(s.dy), as_tensor(transposed(s.weight)));
    const bool first = &s == &shares.front();
    if (!first) sum = operand(add(sum.tensor, product), "backward_group", "sum");
    FusedGemmTailArgs args = tail_of(s, sum.matrix);
    if (first) args.product = operand(product, "backward_group", "product").matrix;
    if (&s == &shares.back()) args.y = dx.matrix;
    epilogue(args, 0, dx.rows, 0, dx.cols);
  }
}

// A panel of dx stays in fp32 until the last rank-r term is added, and is rounded once.
void group_dx_panels(const std::vector<Share>& shares, const Operand& dx) {
  int64_t depth = 0;
  for (const Share& s : shares) depth = std::max(depth, s.dy.cols);
  const auto [row_panel, col_panel] = panel_of(depth);
  for (int64_t row = 0; row < dx.rows; row += row_panel) {
    const int64_t rows = std::min(row_panel, dx.rows - row);
    std::vector<Tensor> dy_panels;
    for (const Share& s : shares) dy_panels.push_back(fp32_rows(s.dy, row, rows));
    for (int64_t col = 0; col < dx.cols; col += col_panel) {
      const int64_t cols = std::min(col_panel, dx.cols - col);
      const Operand sum = operand(empty_cpu({rows, cols}, ScalarType::Float), "backward_group", "");
      for (size_t i = 0; i < shares.size(); ++i) {
        const Tensor w_panel = fp32_rows(shares[i].weight, col, cols);
        addmm_out(sum.tensor, sum.tensor, dy_panels[i], torch::stable::transpose(w_panel, 0, 1),
                  i == 0 ? 0.0 : 1.0, 1.0);
      }
      add_tails(shares, sum, dx, row, col);
    }
  }
}

// dx [..., K], where dy gives the leading dimensions.
Tensor group_dx(const Tensor& dy, const std::vector<Share>& shares) {
  const char* op = "backward_group";
  const Share& first = shares[0];
  const int64_t M = first.dy.rows, K = first.weight.rows;
  const Dtype dtype = first.dy.matrix.dtype;
  bool small = true;
  for (const Share& s : shares) {
    check_gemm(s.dy, s.weight, s.dh, s.up, op);
    check_size(s.dy.rows, M, op, "the number of rows of dy");
    check_size(s.weight.rows, K, op, "weight.size(1)");
    STD_TORCH_CHECK(s.dy.matrix.dtype == dtype, op, ": dys must have one dtype, but have ",
                    name_of(dtype), " and ", name_of(s.dy.matrix.dtype));
    small = small && 2 * M * K * s.dy.cols <= kSmallFlops;
  }
  if (shares.size() == 1)
    return fused_gemm(dy, first.dy, first.weight, first.dh, first.up, std::nullopt, first.dropout,
                      first.scale);
  const std::vector<int64_t> sizes = sizes_of_y(dy, K);
  Tensor dx = empty_cpu(sizes.data(), dy.dim(), dy.scalar_type());
  if (M == 0 || K == 0) return dx;
  const Operand rows = operand(view_2d(dx, M, K, K, 1), op, "dx");
  if (small)
    group_dx_small(shares, rows);
  else if (dtype == Dtype::f32)
    group_dx_f32(shares, rows);
  else if (vendor_multiplies(dtype))
    group_dx_16bit(shares, rows);
  else
    group_dx_panels(shares, rows);
  return dx;
}

// ---- the operators ------------------------------------------------------------------------------

Tensor dropout_mask_op(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  Tensor mask = empty_cpu({rows, cols}, ScalarType::Bool);
  if (cols == 0) return mask;
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

std::tuple<std::vector<Tensor>, std::vector<Tensor>> forward_group_op(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_as,
    const std::vector<Tensor>& lora_bs, const std::vector<OptionalTensor>& biases,
    const std::vector<OptionalTensor>& seeds, int64_t threshold,
    const std::vector<double>& h_scales, const std::vector<double>& up_scales) {
  NoGrad no_grad;
  const char* op = "forward_group";
  const size_t count =
      group_size(op, weights, lora_as, lora_bs, biases, seeds, h_scales, up_scales);
  const Operand x_rows = flatten_rows(x, op, "x");
  std::vector<DownProjArgs> pass;
  std::vector<Operand> h;
  for (size_t i = 0; i < count; ++i)
    h.push_back(join_down_proj(pass, x_rows, operand(lora_as[i], op, "lora_a"),
                               dropout_of(seeds[i], threshold, op), h_scales[i]));
  run_down_proj(pass);

  std::vector<Tensor> ys, hs;
  for (size_t i = 0; i < count; ++i) {
    ys.push_back(fused_gemm(x, x_rows, operand(weights[i], op, "weight"), h[i],
                            operand(lora_bs[i], op, "lora_b"), biases[i], {}, up_scales[i]));
    hs.push_back(h[i].tensor);
  }
  return {ys, hs};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> backward_group_op(
    const Tensor& x, const std::vector<Tensor>& dys, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& lora_as, const std::vector<Tensor>& lora_bs,
    const std::vector<Tensor>& hs, const std::vector<OptionalTensor>& seeds, int64_t threshold,
    const std::vector<double>& h_scales, const std::vector<double>& up_scales,
    const std::vector<bool>& wide_a, const std::vector<bool>& wide_b, bool need_x,
    const std::vector<bool>& need_a, const std::vector<bool>& need_b,
    const std::vector<bool>& need_bias) {
  NoGrad no_grad;
  const char* op = "backward_group";
  const size_t count = group_size(op, dys, weights, lora_as, lora_bs, hs, seeds, h_scales,
                                  up_scales, wide_a, wide_b, need_a, need_b, need_bias);
  // Every output is a tensor of its own: results of an op must not share memory.
  auto none = [&] { return empty_cpu({0}, x.scalar_type()); };
  const bool any_a = std::find(need_a.begin(), need_a.end(), true) != need_a.end();
  const Operand x_rows = any_a ? flatten_rows(x, op, "x") : Operand{};

  std::vector<Share> shares;
  std::vector<WeightGradArgs> pass;
  std::vector<Tensor> das, dbs, dbiases;
  for (size_t i = 0; i < count; ++i) {
    const Operand dy = flatten_rows(dys[i], op, "dy"), a = operand(lora_as[i], op, "lora_a");
    const Operand b = operand(lora_bs[i], op, "lora_b");
    const Dropout dropout = dropout_of(seeds[i], threshold, op);
    Operand dh{};
    if (need_x || need_a[i]) dh = down_proj(dy, transposed(b), {}, h_scales[i]);
    // It owns dh, which the pass over x reads.
    shares.push_back({dy, transposed(operand(weights[i], op, "weight")), dh, transposed(a), dropout,
                      up_scales[i]});
    das.push_back(need_a[i]
                      ? join_weight_grad(pass, dh, x_rows, dropout, up_scales[i], wide_a[i], false)
                      : none());
    dbs.push_back(need_b[i]
                      ? weight_grad(operand(hs[i], op, "h"), dy, {}, up_scales[i], wide_b[i], true)
                      : none());
    dbiases.push_back(need_bias[i] ? column_sums(dy) : none());
  }
  Tensor dx = need_x ? group_dx(dys[0], shares) : none();
  run_weight_grad(pass);
  return {dx, das, dbs, dbiases};
}

// Which copy of the CPU kernels this processor runs.
std::string cpu_isa_op() { return kernels().isa; }

void use_16bit_gemm_op(bool bf16, bool fp16) {
  vendor_has_bf16 = bf16;
  vendor_has_fp16 = fp16;
}

}  // namespace

LK_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", LK_BOX(&cpu_isa_op));
  m.impl("use_16bit_gemm", LK_BOX(&use_16bit_gemm_op));
}

LK_LIBRARY_IMPL(CPU, m) {
  m.impl("dropout_mask", LK_BOX(&dropout_mask_op));
  m.impl("down_proj", LK_BOX(&down_proj_op));
  m.impl("fused_gemm", LK_BOX(&fused_gemm_op));
  m.impl("weight_grad", LK_BOX(&weight_grad_op));
  m.impl("forward", LK_BOX(&forward_op));
  m.impl("backward", LK_BOX(&backward_op));
  m.impl("forward_group", LK_BOX(&forward_group_op));
  m.impl("backward_group", LK_BOX(&backward_group_op));
}

}  // namespace lora_kernels

// The CPU ops of projections that share x.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_call.h"
#include "errors.h"
#include "group.h"
#include "library.h"

namespace lora_kernels {
namespace {

using namespace cpu;

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

}  // namespace

LK_LIBRARY_IMPL(CPU, m) {
  m.impl("forward_group", LK_BOX(&forward_group_op));
  m.impl("backward_group", LK_BOX(&backward_group_op));
}

}  // namespace lora_kernels

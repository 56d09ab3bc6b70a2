// The three phases on CPU operands, which the ops of one projection and of groups share.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "aten.h"
#include "convert.h"

namespace lora_kernels::cpu {

constexpr int64_t kTaskFlops = 1 << 17;  // below this a second thread costs more than it saves
constexpr int64_t kSmallFlops =
    1 << 18;  // below this the vendor's call overhead outweighs its GEMM

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

inline Tensor as_tensor(const Operand& a) {
  return view_2d(a.tensor, a.rows, a.cols, a.matrix.row_stride, a.matrix.col_stride);
}

// The part of m that starts at (row, col).
Matrix part(const Matrix& m, int64_t row, int64_t col);

// ---- down_proj ----------------------------------------------------------------------------------

Operand down_proj(const Operand& x, const Operand& down, const Dropout& dropout, double scale);

// h, which the vendor fills now, or `run_down_proj` of the group that it joins.
Operand join_down_proj(std::vector<DownProjArgs>& group, const Operand& x, const Operand& down,
                       const Dropout& dropout, double scale);

// One pass over x, which the group shares: rows meet every projection while a cache holds them.
void run_down_proj(const std::vector<DownProjArgs>& group);

// ---- fused_gemm ---------------------------------------------------------------------------------

// y [..., N], where x_shape gives the leading dimensions.
Tensor fused_gemm(const Tensor& x_shape, const Operand& x, const Operand& weight, const Operand& h,
                  const Operand& up, const OptionalTensor& bias, const Dropout& dropout,
                  double scale);

// Adds the rank-r term and bias to a part of the frozen product, and rounds it into y.
void epilogue(const FusedGemmTailArgs& args, int64_t row, int64_t rows, int64_t col, int64_t cols);

// Whether the vendor's GEMM takes this dtype as it is, and not by way of fp32.
bool vendor_multiplies(Dtype dtype);
void set_vendor_multiplies(bool bf16, bool fp16);

// (rows, columns) of y for which fp32 copies of operands of this depth are made at a time.
std::pair<int64_t, int64_t> panel_of(int64_t depth);

// rows [begin, begin + count) of a 16-bit operand, in fp32.
Tensor fp32_rows(const Operand& a, int64_t begin, int64_t count);

// ---- weight_grad --------------------------------------------------------------------------------

Tensor weight_grad(const Operand& h, const Operand& x, const Dropout& dropout, double scale,
                   bool wide, bool transpose);

// The gradient, which the vendor fills now, or `run_weight_grad` of the group that it joins.
Tensor join_weight_grad(std::vector<WeightGradArgs>& group, const Operand& h, const Operand& x,
                        const Dropout& dropout, double scale, bool wide, bool transpose);

// One pass over x, which the group shares: columns meet every h while a cache holds them.
void run_weight_grad(const std::vector<WeightGradArgs>& group);

// dbias [N] = column sums of dy: a weight gradient whose h is a column of ones.
Tensor column_sums(const Operand& dy);

}  // namespace lora_kernels::cpu

// The operands of the CUDA ops as kernel arguments, for one projection.
#pragma once
#include <utility>

#include "../cuda/backward_plan.h"
#include "cuda_call.h"

namespace lora_kernels {

// The arguments of down_proj with h left to fill in.
inline DownProjArgs down_proj_args(const Operand& x, const Operand& down,
                                   const OptionalTensor& seed, int64_t threshold, double scale,
                                   const char* op = "down_proj", const char* name = "down") {
  check_size(down.cols, x.cols, op, (std::string(name) + ".size(1)").c_str());
  check_cuda_operand(x, x.tensor, x.matrix.dtype, op, "x");
  check_cuda_operand(down, x.tensor, x.matrix.dtype, op, name);
  check_seed_device(seed, x.tensor, op);
  const Dropout dropout = dropout_of(seed, threshold, op);
  const Matrix h{nullptr, down.rows, 1, x.matrix.dtype};
  return {x.matrix,
          down.matrix,
          h,
          x.rows,
          x.cols,
          down.rows,
          static_cast<float>(scale * inverse_keep(dropout)),
          dropout};
}

// The arguments of fused_gemm with y left to fill in; it will be contiguous.
inline FusedGemmArgs fused_gemm_args(const Operand& x, const Operand& weight, const Operand& h,
                                     const Operand& up, const OptionalTensor& bias, double scale,
                                     const char* op) {
  check_gemm(x, weight, h, up, op);
  for (const auto& [operand, name] :
       {std::pair{&x, "x"}, {&weight, "weight"}, {&h, "h"}, {&up, "up"}})
    check_cuda_operand(*operand, x.tensor, x.matrix.dtype, op, name);
  if (bias.has_value())
    STD_TORCH_CHECK(bias->device() == x.tensor.device(), op, ": bias is on device ",
                    bias->get_device_index(), " but must be on that of x, ",
                    x.tensor.get_device_index());
  const int64_t N = weight.rows;
  return {x.matrix,
          weight.matrix,
          h.matrix,
          up.matrix,
          bias_row(bias, N, x.matrix.dtype, op),
          {nullptr, N, 1, x.matrix.dtype},
          x.rows,
          N,
          x.cols,
          h.cols,
          static_cast<float>(scale),
          {}};
}

// ---- forward and backward -----------------------------------------------------------------------

// The operands of a call, for as long as it needs them; `x`: flattened, of which a group has one.
struct ForwardCall {
  const char* op;
  Operand x, weight, a, b, h;
  ForwardArgs args;

  // h is contiguous, and yet to be made.
  ForwardCall(const char* op_, const Operand& x_, const Tensor& weight_, const Tensor& lora_a,
              const Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& seed,
              int64_t threshold, double h_scale, double up_scale)
      : op(op_),
        x(x_),
        weight(operand(weight_, op, "weight")),
        a(operand(lora_a, op, "lora_a")),
        b(operand(lora_b, op, "lora_b")),
        h{x.tensor, {nullptr, a.rows, 1, x.matrix.dtype}, x.rows, a.rows},
        args{down_proj_args(x, a, seed, threshold, h_scale, op, "lora_a"),
             fused_gemm_args(x, weight, h, b, bias, up_scale, op)} {}
};

// A gradient of A or B, of x's dtype or fp32, or nothing.
inline Tensor empty_grad(const Tensor& x, bool wanted, std::vector<int64_t> sizes, bool wide) {
  if (!wanted) sizes = {0};
  return empty_like(x, sizes, wanted && wide ? ScalarType::Float : x.scalar_type());
}

// The operands of a call, for as long as it needs them; `x`: flattened, of which a group has one.
struct BackwardCall {
  const char* op;
  Operand x, weight, a, b, dy, h;
  BackwardArgs args;

  // `dy`, `h`: nullptr for a plan alone, as if they were contiguous.
  BackwardCall(const char* op_, const Tensor* dy_, const Operand& x_, const Tensor& weight_,
               const Tensor& lora_a, const Tensor& lora_b, const Tensor* h_,
               const OptionalTensor& seed, int64_t threshold, double h_scale, double up_scale)
      : op(op_),
        x(x_),
        weight(operand(weight_, op, "weight")),
        a(operand(lora_a, op, "lora_a")),
        b(operand(lora_b, op, "lora_b")),
        dy(dy_ ? flatten_rows(*dy_, op, "dy") : contiguous(weight.rows)),
        h(h_ ? operand(*h_, op, "h") : contiguous(a.rows)),
        args{} {
    check_gemm(x, weight, h, b, op);
    check_size(a.cols, x.cols, op, "lora_a.size(1)");
    check_size(a.rows, b.cols, op, "lora_a.size(0)");
    check_size(dy.rows, x.rows, op, "rows of dy");
    check_size(dy.cols, weight.rows, op, "dy.size(-1)");
    const std::pair<const Operand*, const char*> all[] = {
        {&dy, "dy"}, {&x, "x"}, {&weight, "weight"}, {&a, "lora_a"}, {&b, "lora_b"}, {&h, "h"}};
    for (const auto& [operand, name] : all)
      check_cuda_operand(*operand, x.tensor, x.matrix.dtype, op, name);
    check_seed_device(seed, x.tensor, op);

    const Dropout dropout = dropout_of(seed, threshold, op);
    args.dy = dy.matrix, args.x = x.matrix, args.weight = weight.matrix;
    args.lora_a = a.matrix, args.lora_b = b.matrix, args.h = h.matrix;
    args.M = x.rows, args.N = weight.rows, args.K = x.cols, args.r = a.rows;
    args.h_scale = static_cast<float>(h_scale);
    args.up_scale = static_cast<float>(up_scale);
    args.masked_scale = static_cast<float>(up_scale * inverse_keep(dropout));
    args.dropout = dropout;
  }

  Operand contiguous(int64_t columns) const {
    return {x.tensor, {nullptr, columns, 1, x.matrix.dtype}, x.rows, columns};
  }
  void needs(bool need_x, bool need_a, bool need_b, bool need_bias) {
    args.need_x = need_x, args.need_a = need_a, args.need_b = need_b, args.need_bias = need_bias;
  }
  // Places for the gradients that are wanted; dx is the caller's to give.
  void give(Tensor& da, Tensor& db, Tensor& dbias, bool wide_a, bool wide_b) {
    const Dtype dtype = x.matrix.dtype;
    args.da = {da.mutable_data_ptr(), args.K, 1, wide_a ? Dtype::f32 : dtype};
    args.db = {db.mutable_data_ptr(), args.r, 1, wide_b ? Dtype::f32 : dtype};
    args.dbias = {dbias.mutable_data_ptr(), args.N, 1, dtype};
  }
};

}  // namespace lora_kernels

// The CUDA ops of the backward pass.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../cuda/backward.h"
#include "cuda_call.h"

namespace lora_kernels {
namespace {

// A gradient of A or B, of x's dtype or fp32, or nothing.
Tensor empty_grad(const Tensor& x, bool wanted, std::vector<int64_t> sizes, bool wide) {
  if (!wanted) sizes = {0};
  return empty_like(x, sizes, wanted && wide ? ScalarType::Float : x.scalar_type());
}

Tensor weight_grad_cuda(const Tensor& h, const Tensor& x, const OptionalTensor& seed,
                        int64_t threshold, double scale, bool wide, bool transpose) {
  NoGrad no_grad;
  const char* op = "weight_grad";
  const Operand ranks = operand(h, op, "h"), rows = flatten_rows(x, op, "x");
  check_size(ranks.rows, rows.rows, op, "h.size(0)");
  check_cuda_operand(rows, x, rows.matrix.dtype, op, "x");
  check_cuda_operand(ranks, x, rows.matrix.dtype, op, "h");
  check_seed_device(seed, x, op);

  const int64_t r = ranks.cols, K = rows.cols;
  OnDeviceOf device(x);
  const Target target = target_of(x);
  Tensor grad =
      empty_grad(x, true, transpose ? std::vector<int64_t>{K, r} : std::vector{r, K}, wide);
  const Operand to = operand(grad, op, "grad");
  const Dropout dropout = dropout_of(seed, threshold, op);
  WeightGradPass pass{};
  pass.with_grad = r > 0;
  pass.grad = {ranks.matrix,
               rows.matrix,
               transpose ? transposed(to).matrix : to.matrix,
               rows.rows,
               K,
               r,
               static_cast<float>(scale * inverse_keep(dropout)),
               dropout};
  WeightGradPlan plan = plan_weight_grad(pass, target);
  STD_TORCH_CHECK(plan.served, op, ": ", plan.reason, "; take lora_kernels.composed.weight_grad");
  if (r == 0) return grad;
  const Workspace workspace(place_weight_grad(pass, plan), x);
  check_launch(launch_weight_grad(pass, plan, workspace.data(), target, current_stream(x)), op, r,
               K);
  return grad;
}

// The operands of a call, for as long as it needs them: flattening may have made copies.
struct BackwardCall {
  static constexpr const char* kOp = "backward";
  Operand x, weight, a, b, dy, h;
  BackwardArgs args;

  // `dy`, `h`: nullptr for a plan alone, as if they were contiguous.
  BackwardCall(const Tensor* dy_, const Tensor& x_, const Tensor& weight_, const Tensor& lora_a,
               const Tensor& lora_b, const Tensor* h_, const OptionalTensor& seed,
               int64_t threshold, double h_scale, double up_scale)
      : x(flatten_rows(x_, kOp, "x")),
        weight(operand(weight_, kOp, "weight")),
        a(operand(lora_a, kOp, "lora_a")),
        b(operand(lora_b, kOp, "lora_b")),
        dy(dy_ ? flatten_rows(*dy_, kOp, "dy") : contiguous(weight.rows)),
        h(h_ ? operand(*h_, kOp, "h") : contiguous(a.rows)),
        args{} {
    check_gemm(x, weight, h, b, kOp);
    check_size(a.cols, x.cols, kOp, "lora_a.size(1)");
    check_size(a.rows, b.cols, kOp, "lora_a.size(0)");
    check_size(dy.rows, x.rows, kOp, "rows of dy");
    check_size(dy.cols, weight.rows, kOp, "dy.size(-1)");
    const std::pair<const Operand*, const char*> all[] = {
        {&dy, "dy"}, {&x, "x"}, {&weight, "weight"}, {&a, "lora_a"}, {&b, "lora_b"}, {&h, "h"}};
    for (const auto& [operand, name] : all)
      check_cuda_operand(*operand, x.tensor, x.matrix.dtype, kOp, name);
    check_seed_device(seed, x.tensor, kOp);

    const Dropout dropout = dropout_of(seed, threshold, kOp);
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
  BackwardPlan plan(const Target& target, const BackwardRequest& request) const {
    const BackwardPlan plan = plan_backward(args, target, request);
    STD_TORCH_CHECK(plan.served, kOp, ": not served: ", plan.reason,
                    request.form == BackwardForm::one_grid ? "; take form='passes'"
                                                           : "; take backend='composed'");
    return plan;
  }
};

BackwardRequest request_of(const std::string& form, int64_t tile_n, int64_t group) {
  BackwardRequest request;
  STD_TORCH_CHECK(form_of(form, &request.form), "backward_as: form is '", form,
                  "'; expected one_grid, passes or '' for the better one");
  request.gemm = gemm_request_of(tile_n, group, "backward_as");
  return request;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_as_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const OptionalTensor& seed, int64_t threshold,
    double h_scale, double up_scale, bool wide_a, bool wide_b, bool need_x, bool need_a,
    bool need_b, bool need_bias, const std::string& form, int64_t tile_n, int64_t group) {
  NoGrad no_grad;
  BackwardCall call(&dy, x, weight, lora_a, lora_b, &h, seed, threshold, h_scale, up_scale);
  call.needs(need_x, need_a, need_b, need_bias);
  BackwardArgs& args = call.args;
  OnDeviceOf device(x);
  const Target target = target_of(x);
  Tensor dx = empty_like(x, need_x ? sizes_of_y(x, args.K) : std::vector<int64_t>{0});
  Tensor da = empty_grad(x, need_a, {args.r, args.K}, wide_a);
  Tensor db = empty_grad(x, need_b, {args.N, args.r}, wide_b);
  Tensor dbias = empty_grad(x, need_bias, {args.N}, false);
  const Dtype dtype = call.x.matrix.dtype;
  args.dx = {dx.mutable_data_ptr(), args.K, 1, dtype};
  args.da = {da.mutable_data_ptr(), args.K, 1, wide_a ? Dtype::f32 : dtype};
  args.db = {db.mutable_data_ptr(), args.r, 1, wide_b ? Dtype::f32 : dtype};
  args.dbias = {dbias.mutable_data_ptr(), args.N, 1, dtype};
  const BackwardPlan plan = call.plan(target, request_of(form, tile_n, group));
  const Workspace workspace(plan.workspace_bytes, x);
  check_launch(launch_backward(args, plan, workspace.data(), target, current_stream(x)),
               BackwardCall::kOp, args.M, args.K);
  return {dx, da, db, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const OptionalTensor& seed, int64_t threshold,
    double h_scale, double up_scale, bool wide_a, bool wide_b, bool need_x, bool need_a,
    bool need_b, bool need_bias) {
  return backward_as_cuda(dy, x, weight, lora_a, lora_b, h, seed, threshold, h_scale, up_scale,
                          wide_a, wide_b, need_x, need_a, need_b, need_bias, "", 0, 0);
}

// Of a call whose dy and h are contiguous, for the gradients of x, A and B.
std::string backward_plan_cuda(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                               const Tensor& lora_b, const OptionalTensor& seed,
                               const std::string& form, int64_t tile_n, int64_t group,
                               double up_scale) {
  NoGrad no_grad;
  BackwardCall call(nullptr, x, weight, lora_a, lora_b, nullptr, seed, 0, 1.0, up_scale);
  call.needs(true, true, true, false);
  call.args.dx = {nullptr, call.args.K, 1, call.x.matrix.dtype};
  OnDeviceOf device(x);
  return describe(call.plan(target_of(x), request_of(form, tile_n, group)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("weight_grad", TORCH_BOX(&weight_grad_cuda));
  m.impl("backward", TORCH_BOX(&backward_cuda));
  m.impl("backward_as", TORCH_BOX(&backward_as_cuda));
  m.impl("backward_plan", TORCH_BOX(&backward_plan_cuda));
}

}  // namespace lora_kernels

// The CUDA ops of the backward pass.
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/backward.h"
#include "cuda_operands.h"
#include "errors.h"
#include "library.h"

namespace lora_kernels {
namespace {

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

BackwardPlan plan_of(const BackwardCall& call, const Target& target,
                     const BackwardRequest& request) {
  const BackwardPlan plan = plan_backward(call.args, target, request);
  STD_TORCH_CHECK(plan.served, call.op, ": not served: ", plan.reason,
                  request.form == BackwardForm::one_grid ? "; take form='passes'"
                                                         : "; take backend='composed'");
  return plan;
}

BackwardRequest request_of(const std::string& form, int64_t tile_n, int64_t group) {
  BackwardRequest request;
  const std::string name = form == "sm80" ? "passes" : form;  // by the kernels of sm_80
  STD_TORCH_CHECK(form_of(name, &request.form), "backward_as: form is '", form,
                  "'; expected one_grid, passes, sm80 or '' for the best");
  request.gemm = gemm_request_of(tile_n, group, "backward_as");
  return request;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_as_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const OptionalTensor& seed, int64_t threshold,
    double h_scale, double up_scale, bool wide_a, bool wide_b, bool need_x, bool need_a,
    bool need_b, bool need_bias, const std::string& form, int64_t tile_n, int64_t group) {
  NoGrad no_grad;
  const char* op = "backward";
  BackwardCall call(op, &dy, flatten_rows(x, op, "x"), weight, lora_a, lora_b, &h, seed, threshold,
                    h_scale, up_scale);
  call.needs(need_x, need_a, need_b, need_bias);
  BackwardArgs& args = call.args;
  OnDeviceOf device(x);
  const Target target = target_of(x, form);
  Tensor dx = empty_like(x, need_x ? sizes_of_y(x, args.K) : std::vector<int64_t>{0});
  Tensor da = empty_grad(x, need_a, {args.r, args.K}, wide_a);
  Tensor db = empty_grad(x, need_b, {args.N, args.r}, wide_b);
  Tensor dbias = empty_grad(x, need_bias, {args.N}, false);
  args.dx = {dx.mutable_data_ptr(), args.K, 1, call.x.matrix.dtype};
  call.give(da, db, dbias, wide_a, wide_b);
  const BackwardPlan plan = plan_of(call, target, request_of(form, tile_n, group));
  const Workspace workspace(plan.workspace_bytes, x);
  check_launch(launch_backward(args, plan, workspace.data(), target, current_stream(x)), op, args.M,
               args.K);
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
  const char* op = "backward";
  BackwardCall call(op, nullptr, flatten_rows(x, op, "x"), weight, lora_a, lora_b, nullptr, seed, 0,
                    1.0, up_scale);
  call.needs(true, true, true, false);
  call.args.dx = {nullptr, call.args.K, 1, call.x.matrix.dtype};
  OnDeviceOf device(x);
  return describe(plan_of(call, target_of(x, form), request_of(form, tile_n, group)));
}

}  // namespace

LK_LIBRARY_IMPL(CUDA, m) {
  m.impl("weight_grad", LK_BOX(&weight_grad_cuda));
  m.impl("backward", LK_BOX(&backward_cuda));
  m.impl("backward_as", LK_BOX(&backward_as_cuda));
  m.impl("backward_plan", LK_BOX(&backward_plan_cuda));
}

}  // namespace lora_kernels

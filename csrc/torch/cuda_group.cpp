// The CUDA ops of projections that share x, up to kMaxGroup of them.
#include <tuple>
#include <vector>

#include "../cuda/group.h"
#include "cuda_operands.h"
#include "errors.h"
#include "group.h"
#include "library.h"

namespace lora_kernels {
namespace {

int64_t max_group() { return kMaxGroup; }

void check_count(size_t count, const char* op) {
  STD_TORCH_CHECK(count <= kMaxGroup, op, ": ", count, " projections, but one call takes ",
                  kMaxGroup, "; split the group");
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> forward_group_cuda(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_as,
    const std::vector<Tensor>& lora_bs, const std::vector<OptionalTensor>& biases,
    const std::vector<OptionalTensor>& seeds, int64_t threshold,
    const std::vector<double>& h_scales, const std::vector<double>& up_scales) {
  NoGrad no_grad;
  const char* op = "forward_group";
  const size_t count =
      group_size(op, weights, lora_as, lora_bs, biases, seeds, h_scales, up_scales);
  check_count(count, op);
  OnDeviceOf device(x);
  const Operand rows = flatten_rows(x, op, "x");
  std::vector<ForwardCall> calls;
  std::vector<ForwardArgs> args;
  std::vector<Tensor> ys, hs;
  for (size_t i = 0; i < count; ++i) {
    calls.emplace_back(op, rows, weights[i], lora_as[i], lora_bs[i], biases[i], seeds[i], threshold,
                       h_scales[i], up_scales[i]);
    ForwardArgs& a = calls[i].args;
    ys.push_back(empty_like(x, sizes_of_y(x, a.gemm.N)));
    hs.push_back(empty_like(x, {a.down.M, a.down.r}));
    a.gemm.y.data = ys[i].mutable_data_ptr();
    a.down.h.data = a.gemm.h.data = hs[i].mutable_data_ptr();
    args.push_back(a);
  }
  const int n = static_cast<int>(count);
  const Target target = target_of(x);
  const ForwardGroupPlan plan = plan_forward_group(args.data(), n, target);
  STD_TORCH_CHECK(plan.served, op, ": not served: ", plan.reason, "; take backend='composed'");
  const Workspace workspace(plan.workspace_bytes, x);
  check_launch(
      launch_forward_group(args.data(), n, plan, workspace.data(), target, current_stream(x)), op,
      rows.rows, rows.cols);
  return {ys, hs};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
backward_group_cuda(const Tensor& x, const std::vector<Tensor>& dys,
                    const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_as,
                    const std::vector<Tensor>& lora_bs, const std::vector<Tensor>& hs,
                    const std::vector<OptionalTensor>& seeds, int64_t threshold,
                    const std::vector<double>& h_scales, const std::vector<double>& up_scales,
                    const std::vector<bool>& wide_a, const std::vector<bool>& wide_b, bool need_x,
                    const std::vector<bool>& need_a, const std::vector<bool>& need_b,
                    const std::vector<bool>& need_bias) {
  NoGrad no_grad;
  const char* op = "backward_group";
  const size_t count = group_size(op, dys, weights, lora_as, lora_bs, hs, seeds, h_scales,
                                  up_scales, wide_a, wide_b, need_a, need_b, need_bias);
  check_count(count, op);
  OnDeviceOf device(x);
  const Operand rows = flatten_rows(x, op, "x");
  Tensor dx = empty_like(x, need_x ? sizes_of_y(x, rows.cols) : std::vector<int64_t>{0});
  std::vector<BackwardCall> calls;
  std::vector<BackwardArgs> args;
  std::vector<Tensor> das, dbs, dbiases;
  for (size_t i = 0; i < count; ++i) {
    calls.emplace_back(op, &dys[i], rows, weights[i], lora_as[i], lora_bs[i], &hs[i], seeds[i],
                       threshold, h_scales[i], up_scales[i]);
    BackwardCall& call = calls[i];
    BackwardArgs& a = call.args;
    call.needs(need_x, need_a[i], need_b[i], need_bias[i]);
    das.push_back(empty_grad(x, need_a[i], {a.r, a.K}, wide_a[i]));
    dbs.push_back(empty_grad(x, need_b[i], {a.N, a.r}, wide_b[i]));
    dbiases.push_back(empty_grad(x, need_bias[i], {a.N}, false));
    a.dx = {dx.mutable_data_ptr(), a.K, 1, rows.matrix.dtype};
    call.give(das[i], dbs[i], dbiases[i], wide_a[i], wide_b[i]);
    args.push_back(a);
  }
  const int n = static_cast<int>(count);
  const Target target = target_of(x);
  const BackwardGroupPlan plan = plan_backward_group(args.data(), n, target);
  STD_TORCH_CHECK(plan.served, op, ": not served: ", plan.reason, "; take backend='composed'");
  const Workspace workspace(plan.workspace_bytes, x);
  check_launch(
      launch_backward_group(args.data(), n, plan, workspace.data(), target, current_stream(x)), op,
      rows.rows, rows.cols);
  return {dx, das, dbs, dbiases};
}

}  // namespace

LK_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("max_group", LK_BOX(&max_group)); }

LK_LIBRARY_IMPL(CUDA, m) {
  m.impl("forward_group", LK_BOX(&forward_group_cuda));
  m.impl("backward_group", LK_BOX(&backward_group_cuda));
}

}  // namespace lora_kernels

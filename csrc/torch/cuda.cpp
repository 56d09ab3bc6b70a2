// The CUDA ops of the forward pass. A kernel is registered here once it exists; backend.py asks the
// dispatcher which are.
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/down_proj.h"
#include "../cuda/dropout_mask.h"
#include "../cuda/forward.h"
#include "cuda_operands.h"
#include "errors.h"
#include "library.h"

#ifndef LK_HUB
#include "kernel_sources.h"  // setup.py writes it
#endif

namespace lora_kernels {
namespace {

Tensor dropout_mask_cuda(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  OnDeviceOf device(seed);
  Tensor mask = torch::stable::empty({rows, cols}, ScalarType::Bool, std::nullopt, seed.device());
  DropoutMaskArgs args{static_cast<bool*>(mask.mutable_data_ptr()), rows, cols,
                       dropout_of(seed, threshold, "dropout_mask")};
  check_launch(launch_dropout_mask(args, current_stream(seed)), "dropout_mask", rows, cols);
  return mask;
}

Tensor down_proj_cuda(const Tensor& x, const Tensor& down, const OptionalTensor& seed,
                      int64_t threshold, double scale) {
  const Operand rows = flatten_rows(x, "down_proj", "x"),
                ranks = operand(down, "down_proj", "down");
  DownProjArgs args = down_proj_args(rows, ranks, seed, threshold, scale);
  OnDeviceOf device(x);
  Tensor h = empty_like(x, {args.M, args.r});
  args.h.data = h.mutable_data_ptr();
  const DownProjPlan plan = plan_down_proj(args, target_of(x));
  check_launch(launch_down_proj(args, plan, current_stream(x)), "down_proj", args.M, args.r);
  return h;
}

std::string down_proj_plan_cuda(const Tensor& x, const Tensor& down, const OptionalTensor& seed) {
  const Operand rows = flatten_rows(x, "down_proj", "x"),
                ranks = operand(down, "down_proj", "down");
  const DownProjArgs args = down_proj_args(rows, ranks, seed, 0, 1.0);
  OnDeviceOf device(x);
  return describe(plan_down_proj(args, target_of(x)));
}

// ---- fused_gemm ---------------------------------------------------------------------------------

Tensor fused_gemm_cuda(const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& up,
                       const OptionalTensor& bias, const OptionalTensor& seed, int64_t threshold,
                       double scale) {
  NoGrad no_grad;
  const char* op = "fused_gemm";
  // Kept until the launch: flattening x may have made a copy.
  const Operand rows = flatten_rows(x, op, "x"), w = operand(weight, op, "weight"),
                h_rows = operand(h, op, "h"), b = operand(up, op, "up");
  check_seed_device(seed, x, op);
  const Dropout dropout = dropout_of(seed, threshold, op);
  FusedGemmArgs args = fused_gemm_args(rows, w, h_rows, b, bias, scale * inverse_keep(dropout), op);
  args.dropout = dropout;
  OnDeviceOf device(x);
  const Target target = target_of(x);
  Tensor y = empty_like(x, sizes_of_y(x, args.N));
  args.y.data = y.mutable_data_ptr();
  FusedGemmPlan plan = plan_fused_gemm(args, target);
  STD_TORCH_CHECK(plan.served, op, ": ", plan.reason, "; take lora_kernels.composed.fused_gemm");
  const Workspace workspace(place_packed(plan), x);
  check_launch(launch_fused_gemm(args, plan, workspace.data(), target, current_stream(x)), op,
               args.M, args.N);
  return y;
}

// ---- forward ------------------------------------------------------------------------------------

ForwardPlan plan_of(const ForwardCall& call, const Target& target, const ForwardRequest& request) {
  const ForwardPlan plan = plan_forward(call.args, target, request);
  STD_TORCH_CHECK(plan.served, call.op, ": not served: ", plan.reason,
                  request.form == ForwardForm::one_launch ? "; take form='two_launches'"
                  : request.form == ForwardForm::decode   ? "; take form=''"
                                                          : "; take backend='composed'");
  return plan;
}

ForwardRequest request_of(const std::string& form, int64_t tile_n, int64_t group) {
  ForwardRequest request;
  const std::string name = form == "sm80" ? "two_launches" : form;  // by the kernels of sm_80
  STD_TORCH_CHECK(form_of(name, &request.form), "forward_as: form is '", form,
                  "'; expected one_launch, two_launches, decode, sm80 or '' for the best");
  request.gemm = gemm_request_of(tile_n, group, "forward_as");
  return request;
}

std::tuple<Tensor, Tensor> forward_as_cuda(const Tensor& x, const Tensor& weight,
                                           const Tensor& lora_a, const Tensor& lora_b,
                                           const OptionalTensor& bias, const OptionalTensor& seed,
                                           int64_t threshold, double h_scale, double up_scale,
                                           const std::string& form, int64_t tile_n, int64_t group) {
  NoGrad no_grad;
  const char* op = "forward";
  ForwardCall call(op, flatten_rows(x, op, "x"), weight, lora_a, lora_b, bias, seed, threshold,
                   h_scale, up_scale);
  OnDeviceOf device(x);
  const Target target = target_of(x, form);
  Tensor y = empty_like(x, sizes_of_y(x, call.args.gemm.N));
  Tensor h = empty_like(x, {call.h.rows, call.h.cols});
  call.args.gemm.y.data = y.mutable_data_ptr();
  call.args.down.h.data = call.args.gemm.h.data = h.mutable_data_ptr();
  const ForwardPlan plan = plan_of(call, target, request_of(form, tile_n, group));
  const Workspace workspace(plan.workspace_bytes, x);
  check_launch(launch_forward(call.args, plan, workspace.data(), target, current_stream(x)), op,
               call.args.gemm.M, call.args.gemm.N);
  return {y, h};
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                        const Tensor& lora_b, const OptionalTensor& bias,
                                        const OptionalTensor& seed, int64_t threshold,
                                        double h_scale, double up_scale) {
  return forward_as_cuda(x, weight, lora_a, lora_b, bias, seed, threshold, h_scale, up_scale, "", 0,
                         0);
}

std::string forward_plan_cuda(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                              const Tensor& lora_b, const OptionalTensor& seed,
                              const std::string& form, int64_t tile_n, int64_t group,
                              double up_scale) {
  NoGrad no_grad;
  const char* op = "forward";
  const ForwardCall call(op, flatten_rows(x, op, "x"), weight, lora_a, lora_b, std::nullopt, seed,
                         0, 1.0, up_scale);
  OnDeviceOf device(x);
  return describe(plan_of(call, target_of(x, form), request_of(form, tile_n, group)));
}

bool has_sm90a() { return built_with_sm90a(); }

// The hash of what the kernels in this library were built from, by csrc/digest.py.
#ifdef LK_KERNEL_SOURCES  // without it no measurement holds for this build
std::string kernel_sources() { return LK_KERNEL_SOURCES; }
#endif

}  // namespace

LK_LIBRARY_IMPL(CUDA, m) {
  m.impl("dropout_mask", LK_BOX(&dropout_mask_cuda));
  m.impl("down_proj", LK_BOX(&down_proj_cuda));
  m.impl("down_proj_plan", LK_BOX(&down_proj_plan_cuda));
  m.impl("fused_gemm", LK_BOX(&fused_gemm_cuda));
  m.impl("forward", LK_BOX(&forward_cuda));
  m.impl("forward_as", LK_BOX(&forward_as_cuda));
  m.impl("forward_plan", LK_BOX(&forward_plan_cuda));
}

LK_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("has_sm90a", LK_BOX(&has_sm90a));
#ifdef LK_KERNEL_SOURCES
  m.impl("kernel_sources", LK_BOX(&kernel_sources));
#endif
}

}  // namespace lora_kernels

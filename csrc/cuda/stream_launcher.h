// The launches that plans make (run_forward, run_backward), on a stream.
#pragma once
#include "backward.h"
#include "decode.h"
#include "down_proj.h"
#include "forward.h"
#include "weight_grad.h"

namespace lora_kernels {

struct StreamLauncher {
  int multiprocessors;
  cudaStream_t stream;

  cudaError_t pack(const PackJobs& jobs) { return launch_pack(jobs, multiprocessors, stream); }
  cudaError_t zero(uint32_t* words, uint32_t count) { return launch_zero(words, count, stream); }
  cudaError_t down_proj(const DownProjArgs& args, const DownProjPlan& plan) {
    return launch_down_proj(args, plan, stream);
  }
  cudaError_t down_proj_group(const DownProjArgs* each, int count, const DownProjGroupPlan& plan) {
    return launch_down_proj_group(each, count, plan, stream);
  }
  cudaError_t fused_gemm(const FusedGemmGroup& group, void* workspace, bool early) {
    return group.plans[0].kernel == Kernel::sm90
               ? launch_fused_gemm_sm90(group, workspace, early, stream)
               : launch_fused_gemm_sm80(group, workspace, stream);
  }
  cudaError_t forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace) {
    return launch_forward_sm90(args, plan, workspace, stream);
  }
  cudaError_t decode(const ForwardArgs& args, const DecodePlan& plan) {
    return launch_decode(args, plan, stream);
  }
  cudaError_t weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
    return launch_weight_grad_pass(pass, plan, workspace, stream);
  }
  cudaError_t reduce(const ReduceJobs& jobs) {
    return launch_reduce(jobs, multiprocessors, stream);
  }
  cudaError_t backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace) {
    return launch_backward_sm90(args, plan, workspace, stream);
  }
};

}  // namespace lora_kernels

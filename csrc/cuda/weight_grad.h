// The launchers of weight_grad_sm80.cuh, weight_grad_sm90.cuh and reduce.cuh.
#pragma once
#include "launch.h"
#include "weight_grad_plan.h"

namespace lora_kernels {

cudaError_t launch_weight_grad_sm90(const WeightGradPass& pass, const WeightGradPlan& plan,
                                    void* workspace, cudaStream_t stream);
cudaError_t launch_weight_grad_sm80(const WeightGradPass& pass, const WeightGradPlan& plan,
                                    void* workspace, cudaStream_t stream);
// Whichever kernel the plan says: partial results, which launch_reduce adds.
inline cudaError_t launch_weight_grad_pass(const WeightGradPass& pass, const WeightGradPlan& plan,
                                           void* workspace, cudaStream_t stream) {
  return plan.kernel == Kernel::sm90 ? launch_weight_grad_sm90(pass, plan, workspace, stream)
                                     : launch_weight_grad_sm80(pass, plan, workspace, stream);
}
cudaError_t launch_reduce(const ReduceJobs& jobs, int multiprocessors, cudaStream_t stream);

inline dim3 grid_of(const WeightGradPlan& plan) {
  const auto chunks = static_cast<unsigned>(plan.chunks);
  const auto beside = static_cast<unsigned>(plan.splits * plan.rank_blocks);
  return plan.kernel == Kernel::sm90 ? dim3(chunks, beside) : dim3(beside, chunks);
}

}  // namespace lora_kernels

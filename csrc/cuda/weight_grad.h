// The launchers of weight_grad_sm90.cuh and reduce.cuh.
#pragma once
#include "launch.h"
#include "weight_grad_plan.h"

namespace lora_kernels {

cudaError_t launch_weight_grad_sm90(const WeightGradPass& pass, const WeightGradPlan& plan,
                                    void* workspace, cudaStream_t stream);
cudaError_t launch_reduce(const ReduceJobs& jobs, int multiprocessors, cudaStream_t stream);

inline dim3 grid_of(const WeightGradPlan& plan) {
  return dim3(static_cast<unsigned>(plan.chunks),
              static_cast<unsigned>(plan.splits * plan.rank_blocks));
}

}  // namespace lora_kernels

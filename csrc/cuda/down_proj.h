// The launchers of down_proj_sm80.cuh and down_proj_sm90.cuh.
#pragma once
#include "launch.h"

namespace lora_kernels {

// All pointers in args, the seed included, are device pointers; x, down and h are bf16 or fp16.
cudaError_t launch_down_proj(const DownProjArgs& args, const DownProjPlan& plan,
                             cudaStream_t stream);

cudaError_t launch_down_proj_sm80(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream);
cudaError_t launch_down_proj_sm90(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream);
// `count` projections of one x, for which the plan was made.
cudaError_t launch_down_proj_group(const DownProjArgs* each, int count,
                                   const DownProjGroupPlan& plan, cudaStream_t stream);

// Of sm_80.
inline dim3 grid_of(const DownProjPlan& plan) {
  return dim3(static_cast<unsigned>(plan.blocks * plan.rank_blocks));
}

}  // namespace lora_kernels

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

inline dim3 grid_of(const DownProjPlan& plan) {
  return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.rank_blocks));
}

}  // namespace lora_kernels

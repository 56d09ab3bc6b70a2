// The launchers of down_proj_sm80.cuh and down_proj_sm90.cuh.
#pragma once
#include <cuda_runtime_api.h>

#include "down_proj_plan.h"

namespace lora_kernels {

// All pointers in args, the seed included, are device pointers; x, down and h are bf16 or fp16.
cudaError_t launch_down_proj(const DownProjArgs& args, cudaStream_t stream);
// The plan that launch_down_proj follows on the current device (of the first kMaxRank ranks).
cudaError_t device_plan_down_proj(const DownProjArgs& args, DownProjPlan* plan);

cudaError_t launch_down_proj_sm80(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream);
cudaError_t launch_down_proj_sm90(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream);

}  // namespace lora_kernels

// The launchers of down_proj_sm80.cuh and down_proj_sm90.cuh.
#pragma once
#include <cuda_runtime_api.h>

#include "down_proj_plan.h"

namespace lora_kernels {

// All pointers in args, the seed included, are device pointers; x, down and h are bf16 or fp16.
// `device` is the current device.
cudaError_t launch_down_proj(const DownProjArgs& args, int device, cudaStream_t stream);
// The plan that launch_down_proj follows.
cudaError_t device_plan_down_proj(const DownProjArgs& args, int device, DownProjPlan* plan);

cudaError_t launch_down_proj_sm80(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream);
cudaError_t launch_down_proj_sm90(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream);

inline dim3 grid_of(const DownProjPlan& plan) {
  return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.rank_blocks));
}
// What a launch of more than 48 KB needs. A failure is not left behind as the thread's last error,
// where the next good launch would find it.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace lora_kernels

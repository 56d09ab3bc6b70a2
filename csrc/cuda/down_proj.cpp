#include "down_proj.h"

#include <algorithm>

namespace lora_kernels {

cudaError_t device_plan_down_proj(const DownProjArgs& args, DownProjPlan* plan) {
  int device, major, minor, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  const auto attribute = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
  };
  attribute(&major, cudaDevAttrComputeCapabilityMajor);
  attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  *plan = plan_down_proj(rank_slice(args, 0), 10 * major + minor, multiprocessors);
  return cudaSuccess;
}

cudaError_t launch_down_proj(const DownProjArgs& args, cudaStream_t stream) {
  for (int64_t first = 0; first < args.r; first += kMaxRank) {
    const DownProjArgs slice = rank_slice(args, first);
    DownProjPlan plan;
    cudaError_t error = device_plan_down_proj(slice, &plan);
    if (error == cudaSuccess && plan.kernel == DownProjKernel::sm80)
      error = launch_down_proj_sm80(slice, plan, stream);
    if (error == cudaSuccess && plan.kernel == DownProjKernel::sm90)
      error = launch_down_proj_sm90(slice, plan, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lora_kernels

#include "down_proj.h"

namespace lora_kernels {
namespace {

#ifdef LK_SM90A
constexpr bool kSm90a = true;
#else
constexpr bool kSm90a = false;
#endif

}  // namespace

cudaError_t device_plan_down_proj(const DownProjArgs& args, int device, DownProjPlan* plan) {
  int major = 0, minor = 0, multiprocessors = 0;
  cudaError_t error = cudaSuccess;
  const auto attribute = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
  };
  attribute(&major, cudaDevAttrComputeCapabilityMajor);
  attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess)
    *plan = plan_down_proj(args, {10 * major + minor, multiprocessors, kSm90a});
  return error;
}

cudaError_t launch_down_proj(const DownProjArgs& args, int device, cudaStream_t stream) {
  DownProjPlan plan;
  const cudaError_t error = device_plan_down_proj(args, device, &plan);
  if (error != cudaSuccess || plan.kernel == DownProjKernel::none) return error;
  return plan.kernel == DownProjKernel::sm90 ? launch_down_proj_sm90(args, plan, stream)
                                             : launch_down_proj_sm80(args, plan, stream);
}

}  // namespace lora_kernels

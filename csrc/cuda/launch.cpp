#include "launch.h"

namespace lora_kernels {
namespace {

#ifdef LK_SM90A
constexpr bool kSm90a = true;
#else
constexpr bool kSm90a = false;
#endif

}  // namespace

bool built_with_sm90a() { return kSm90a; }

cudaError_t device_target(int device, Target* target) {
  int major = 0, minor = 0, multiprocessors = 0;
  cudaError_t error = cudaSuccess;
  const auto attribute = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
  };
  attribute(&major, cudaDevAttrComputeCapabilityMajor);
  attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) *target = {10 * major + minor, multiprocessors, kSm90a};
  return error;
}

}  // namespace lora_kernels

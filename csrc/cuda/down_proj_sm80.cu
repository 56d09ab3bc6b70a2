#include "down_proj_sm80.cuh"

#include "down_proj.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  with_down_proj_sm80<T>(plan, [&](auto kernel) {
    error = launch_kernel(kernel, grid_of(plan), plan.threads, plan.shared_bytes, stream, false,
                          args, plan.layout);
  });
  return error;
}

}  // namespace

cudaError_t launch_down_proj_sm80(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream) {
  return args.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(args, plan, stream)
                                     : launch_typed<ptx::f16>(args, plan, stream);
}

}  // namespace lora_kernels

// The launcher of fused_gemm_sm80.cuh.
#include "fused_gemm_sm80.cuh"

#include "forward.h"
#include "launch.h"

namespace lora_kernels {
namespace {

static_assert(sizeof(FusedGemmSm80Work) <= 4096, "a launch takes 4 KB of parameters");

template <class T>
cudaError_t launch_typed(const FusedGemmGroup& group, void* workspace, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  const FusedGemmPlan& plan = group.plans[0];
  with_fused_gemm_sm80<T>(plan, [&](auto kernel) {
    error = launch_kernel(kernel, dim3(group.raster.items()), plan.threads, plan.shared_bytes,
                          stream, false, sm80_work_of(group, workspace));
  });
  return error;
}

}  // namespace

cudaError_t launch_fused_gemm_sm80(const FusedGemmGroup& group, void* workspace,
                                   cudaStream_t stream) {
  return group.args[0].x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(group, workspace, stream)
                                              : launch_typed<ptx::f16>(group, workspace, stream);
}

}  // namespace lora_kernels

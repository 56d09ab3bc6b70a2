// The launcher of fused_gemm_sm90.cuh.
#include "encode_tensor_map.h"
#include "forward.h"
#include "fused_gemm_work.h"
#include "launch.h"

// The fat binary also holds sm_80, which has neither TMA nor wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "fused_gemm_sm90.cuh"
#else
#include "ptx.cuh"
namespace lora_kernels {
template <class Tile, class T, bool kMnMajor, bool kMasked>
__global__ void fused_gemm_sm90_kernel(const __grid_constant__ GemmGroupMaps<ptx::TensorMap>,
                                       const __grid_constant__ FusedGemmGroupWork) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "fused_gemm_sm90_dispatch.h"

namespace lora_kernels {
namespace {

static_assert(sizeof(GemmGroupMaps<CUtensorMap>) + sizeof(FusedGemmGroupWork) <= 4096,
              "a launch takes 4 KB of parameters");

template <class T>
cudaError_t launch_typed(const FusedGemmGroup& group, void* workspace, bool early,
                         cudaStream_t stream) {
  GemmGroupMaps<CUtensorMap> maps{};
  cudaError_t error = encode_fused_gemm_maps(maps_of(group, workspace), group.count, &maps);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  const FusedGemmPlan& plan = group.plans[0];
  with_fused_gemm_sm90<T>(group, [&](auto kernel) {
    error = launch_kernel(kernel, dim3(2 * group.clusters), plan.threads, plan.shared_bytes, stream,
                          early, maps, work_of(group, workspace));
  });
  return error;
}

}  // namespace

cudaError_t launch_fused_gemm_sm90(const FusedGemmGroup& group, void* workspace, bool early,
                                   cudaStream_t stream) {
  return group.args[0].x.dtype == Dtype::bf16
             ? launch_typed<ptx::bf16>(group, workspace, early, stream)
             : launch_typed<ptx::f16>(group, workspace, early, stream);
}

}  // namespace lora_kernels

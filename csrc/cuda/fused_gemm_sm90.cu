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
__global__ void fused_gemm_sm90_kernel(const __grid_constant__ ptx::TensorMap,
                                       const __grid_constant__ ptx::TensorMap,
                                       const __grid_constant__ ptx::TensorMap,
                                       const __grid_constant__ ptx::TensorMap,
                                       const __grid_constant__ ptx::TensorMap,
                                       const FusedGemmWork) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "fused_gemm_sm90_dispatch.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                         bool early, cudaStream_t stream) {
  EncodedFusedGemmMaps maps;
  cudaError_t error = encode_fused_gemm_maps(maps_of(args, plan, workspace), &maps);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  with_fused_gemm_sm90<T>(plan, [&](auto kernel) {
    error = launch_kernel(kernel, dim3(2 * plan.clusters), plan.threads, plan.shared_bytes, stream,
                          early, maps.x, maps.weight, maps.h, maps.up, maps.y,
                          work_of(args, plan, plan.raster, workspace));
  });
  return error;
}

}  // namespace

cudaError_t launch_fused_gemm_sm90(const FusedGemmArgs& args, const FusedGemmPlan& plan,
                                   void* workspace, bool early, cudaStream_t stream) {
  return args.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(args, plan, workspace, early, stream)
                                     : launch_typed<ptx::f16>(args, plan, workspace, early, stream);
}

}  // namespace lora_kernels

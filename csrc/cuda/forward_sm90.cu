// The launcher of forward_sm90.cuh.
#include "encode_tensor_map.h"
#include "forward.h"
#include "forward_work.h"
#include "launch.h"

// The fat binary also holds sm_80, which has neither TMA nor wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "forward_sm90.cuh"
#else
#include "ptx.cuh"
namespace lora_kernels {
template <class Tile, class T, int kRank>
__global__ void forward_sm90_kernel(const __grid_constant__ ptx::TensorMap,
                                    const __grid_constant__ ptx::TensorMap,
                                    const __grid_constant__ ptx::TensorMap,
                                    const __grid_constant__ ptx::TensorMap,
                                    const __grid_constant__ ptx::TensorMap,
                                    const __grid_constant__ ptx::TensorMap, const DownProjArgs,
                                    const ForwardWork) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "forward_sm90_dispatch.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                         cudaStream_t stream) {
  EncodedFusedGemmMaps maps;
  CUtensorMap a_map;
  cudaError_t error = encode_fused_gemm_maps(maps_of(args.gemm, plan.gemm, workspace), &maps);
  if (error == cudaSuccess) error = encode_tensor_map(a_map_spec(plan, workspace), &a_map);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  with_forward_sm90<T>(plan, [&](auto kernel) {
    error = launch_kernel(kernel, dim3(2 * plan.clusters), plan.gemm.threads,
                          plan.gemm.shared_bytes, stream, true, maps.x, maps.weight, a_map, maps.h,
                          maps.up, maps.y, args.down, work_of(args, plan, workspace));
  });
  return error;
}

}  // namespace

cudaError_t launch_forward_sm90(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                                cudaStream_t stream) {
  return args.down.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(args, plan, workspace, stream)
                                          : launch_typed<ptx::f16>(args, plan, workspace, stream);
}

}  // namespace lora_kernels

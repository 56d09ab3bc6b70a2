// The launcher of backward_sm90.cuh.
#include "backward.h"
#include "backward_work.h"
#include "encode_tensor_map.h"
#include "launch.h"

// The fat binary also holds sm_80, which has neither TMA nor wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "backward_sm90.cuh"
#else
#include "ptx.cuh"
namespace lora_kernels {
template <class Tile, class T, int kRank>
__global__ void backward_sm90_kernel(
    const __grid_constant__ ptx::TensorMap, const __grid_constant__ ptx::TensorMap,
    const __grid_constant__ ptx::TensorMap, const __grid_constant__ ptx::TensorMap,
    const __grid_constant__ ptx::TensorMap, const __grid_constant__ ptx::TensorMap,
    const __grid_constant__ ptx::TensorMap, const __grid_constant__ ptx::TensorMap,
    const __grid_constant__ ptx::TensorMap, const BackwardWork) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "backward_sm90_dispatch.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                         cudaStream_t stream) {
  const Matrix dh = plan.dh(workspace, args.dy.dtype);
  const BackwardOnlyMaps specs = backward_maps_of(args, plan, workspace);
  EncodedFusedGemmMaps maps;
  CUtensorMap h_map, down_map, x_map, turned_map;
  cudaError_t error = encode_fused_gemm_maps(
      maps_of(dx_args_of(args, dh), gemm_of(args, plan, workspace), workspace), &maps);
  if (error == cudaSuccess) error = encode_tensor_map(specs.h, &h_map);
  if (error == cudaSuccess) error = encode_tensor_map(specs.down, &down_map);
  if (error == cudaSuccess) error = encode_tensor_map(specs.x, &x_map);
  if (error == cudaSuccess) error = encode_tensor_map(specs.turned_dh, &turned_map);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  with_backward_sm90<T>(plan, [&](auto kernel) {
    error =
        launch_kernel(kernel, dim3(2 * plan.grid.clusters), plan.gemm.threads,
                      plan.gemm.shared_bytes, stream, true, maps.x, maps.weight, maps.h, maps.up,
                      maps.y, h_map, down_map, x_map, turned_map, work_of(args, plan, workspace));
  });
  return error;
}

}  // namespace

cudaError_t launch_backward_sm90(const BackwardArgs& args, const BackwardPlan& plan,
                                 void* workspace, cudaStream_t stream) {
  return args.dy.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(args, plan, workspace, stream)
                                      : launch_typed<ptx::f16>(args, plan, workspace, stream);
}

}  // namespace lora_kernels

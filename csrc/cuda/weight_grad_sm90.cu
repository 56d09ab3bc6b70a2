// The launcher of weight_grad_sm90.cuh.
#include "encode_tensor_map.h"
#include "weight_grad.h"

// The fat binary also holds sm_80, which has neither TMA nor wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "weight_grad_sm90.cuh"
#else
#include "ptx.cuh"
namespace lora_kernels {
template <class Tile, class T, bool kDown>
__global__ void weight_grad_sm90_kernel(const __grid_constant__ ptx::TensorMap,
                                        const __grid_constant__ ptx::TensorMap,
                                        const __grid_constant__ ptx::TensorMap,
                                        const WorkOf<kDown>) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "weight_grad_sm90_dispatch.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                         cudaStream_t stream) {
  const WeightGradMaps specs = maps_of(pass, plan, workspace);
  CUtensorMap x_map, h_map, down_map;
  cudaError_t error = encode_tensor_map(specs.x, &x_map);
  if (error == cudaSuccess) error = encode_tensor_map(specs.h, &h_map);
  if (error == cudaSuccess) error = encode_tensor_map(specs.down, &down_map);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  with_weight_grad_sm90<T>(pass, plan, workspace, [&](auto kernel, const auto& work) {
    error = launch_kernel(kernel, grid_of(plan), plan.threads, plan.shared_bytes, stream, false,
                          x_map, h_map, down_map, work);
  });
  return error;
}

}  // namespace

cudaError_t launch_weight_grad_sm90(const WeightGradPass& pass, const WeightGradPlan& plan,
                                    void* workspace, cudaStream_t stream) {
  return pass.grad.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(pass, plan, workspace, stream)
                                          : launch_typed<ptx::f16>(pass, plan, workspace, stream);
}

}  // namespace lora_kernels

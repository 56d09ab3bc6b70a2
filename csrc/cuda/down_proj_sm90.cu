#include "down_proj.h"
#include "encode_tensor_map.h"

// The fat binary also holds sm_80, which has neither TMA nor wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "down_proj_sm90.cuh"
#else
#include "ptx.cuh"
namespace lora_kernels {
template <class Tile, class T, bool kMnMajor, bool kDropout>
__global__ void down_proj_sm90_kernel(const __grid_constant__ ptx::TensorMap,
                                      const __grid_constant__ ptx::TensorMap, const DownProjArgs,
                                      const bool) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "down_proj_sm90_dispatch.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, down_map;
  cudaError_t error = encode_tensor_map(x_map_spec(args, plan), &x_map);
  if (error == cudaSuccess) error = encode_tensor_map(down_map_spec(args, plan), &down_map);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  with_down_proj_sm90<T>(plan, args.dropout.seed != nullptr, [&](auto kernel) {
    error = launch_kernel(kernel, grid_of(plan), plan.threads, plan.shared_bytes, stream, false,
                          x_map, down_map, args, plan.layout.h_pairs);
  });
  return error;
}

}  // namespace

cudaError_t launch_down_proj_sm90(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream) {
  return args.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(args, plan, stream)
                                     : launch_typed<ptx::f16>(args, plan, stream);
}

}  // namespace lora_kernels

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

namespace lora_kernels {
namespace {

template <class Tile, class T, bool kMnMajor, bool kDropout>
cudaError_t launch(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, down_map;
  cudaError_t error = encode_tensor_map(x_map_spec(args, plan), &x_map);
  if (error == cudaSuccess) error = encode_tensor_map(down_map_spec(args, plan), &down_map);
  const auto kernel = down_proj_sm90_kernel<Tile, T, kMnMajor, kDropout>;
  if (error == cudaSuccess) error = allow_shared_memory(kernel, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid_of(plan), Tile::kThreads, Tile::kSharedBytes, stream>>>(x_map, down_map, args,
                                                                        plan.layout.h_pairs);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_typed(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  with_sm90_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    if (plan.layout.mn_major) {
      if constexpr (Tile::kRank >= kRowElements)
        error = launch<Tile, T, true, false>(args, plan, stream);
    } else if (args.dropout.seed != nullptr) {
      error = launch<Tile, T, false, true>(args, plan, stream);
    } else {
      error = launch<Tile, T, false, false>(args, plan, stream);
    }
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

#include "down_proj.h"
#include "down_proj_sm80.cuh"

namespace lora_kernels {
namespace {

template <class Tile, class T>
cudaError_t launch(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  const auto kernel = down_proj_sm80_kernel<Tile, T>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(plan.blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(
      args, plan.layout);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_down_proj_sm80(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  with_sm80_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    error = args.x.dtype == Dtype::bf16 ? launch<Tile, ptx::bf16>(args, plan, stream)
                                        : launch<Tile, ptx::f16>(args, plan, stream);
  });
  return error;
}

}  // namespace lora_kernels

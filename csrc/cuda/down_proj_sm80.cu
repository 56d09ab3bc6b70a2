#include "down_proj.h"
#include "down_proj_sm80.cuh"

namespace lora_kernels {
namespace {

template <class Tile, class T, bool kVectors>
cudaError_t launch(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  const auto kernel = down_proj_sm80_kernel<Tile, T, kVectors>;
  const cudaError_t error = allow_shared_memory(kernel, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid_of(plan), Tile::kThreads, Tile::kSharedBytes, stream>>>(args, plan.layout.mn_major,
                                                                        plan.layout.h_pairs);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_typed(const DownProjArgs& args, const DownProjPlan& plan, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  const bool vectors = plan.layout.x_vectors && plan.layout.down_vectors;
  with_sm80_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    error = vectors ? launch<Tile, T, true>(args, plan, stream)
                    : launch<Tile, T, false>(args, plan, stream);
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

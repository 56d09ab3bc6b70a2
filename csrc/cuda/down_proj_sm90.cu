#include "down_proj.h"
#include "down_proj_work.h"
#include "encode_tensor_map.h"

// The fat binary also holds sm_80, which has neither TMA nor wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "down_proj_sm90.cuh"
#else
#include "ptx.cuh"
namespace lora_kernels {
template <class Tile, class T, bool kMnMajor>
__global__ void down_proj_sm90_kernel(const __grid_constant__ ptx::TensorMap,
                                      const __grid_constant__ DownProjMaps<ptx::TensorMap>,
                                      const __grid_constant__ DownProjWork) {
  __trap();  // never launched: the plan asks whether sm_90a is in the library
}
}  // namespace lora_kernels
#endif

#include "down_proj_sm90_dispatch.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const DownProjArgs* each, int count, const DownProjGroupPlan& plan,
                         cudaStream_t stream) {
  const DownProjPlan& tile = plan.tile;
  CUtensorMap x_map;
  DownProjMaps<CUtensorMap> down_maps{};
  cudaError_t error = encode_tensor_map(x_map_spec(each[0], plan), &x_map);
  for (int i = 0; i < count && error == cudaSuccess; ++i)
    error = encode_tensor_map(down_map_spec(each[i], plan, i), &down_maps.down[i]);
  if (error != cudaSuccess) return error;
  error = cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(tile.blocks * tile.rank_blocks));
  with_down_proj_sm90<T>(tile, [&](auto kernel) {
    error = launch_kernel(kernel, grid, tile.threads, tile.shared_bytes, stream, false, x_map,
                          down_maps, work_of(each, count, plan));
  });
  return error;
}

}  // namespace

cudaError_t launch_down_proj_group(const DownProjArgs* each, int count,
                                   const DownProjGroupPlan& plan, cudaStream_t stream) {
  if (!plan.served) return cudaErrorInvalidValue;
  if (plan.tile.kernel == Kernel::none) return cudaSuccess;
  return each[0].x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(each, count, plan, stream)
                                        : launch_typed<ptx::f16>(each, count, plan, stream);
}

cudaError_t launch_down_proj_sm90(const DownProjArgs& args, const DownProjPlan& plan,
                                  cudaStream_t stream) {
  return launch_down_proj_group(&args, 1, group_of_one(plan), stream);
}

}  // namespace lora_kernels

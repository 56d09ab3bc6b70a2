// y [M, N] = x [M, K] * weight [N, K]^T + h [M, r] * up [N, r]^T + bias by TMA and wgmma; kMasked:
// with dropout's mask on the LoRA term.
//
// Persistent clusters of two blocks go through the tiles of y. In each block one thread loads
// stages of x and weight into a ring, then, in the same ring, of h and up: to the accumulators the
// LoRA term is a little more depth. Two warpgroups multiply, add the bias, round once and store. W0
// is loaded once a cluster.
//
// The kernel ahead of it in the stream may still be making h: it is waited for before h is read,
// and for nothing else. csrc/cuda/forward_sm90.cuh needs no kernel ahead of it.
#pragma once
#include "fused_gemm_tile.cuh"

namespace lora_kernels {

template <class Tile, class T, bool kMnMajor, bool kMasked>
__global__ void __cluster_dims__(Tile::kCluster, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    fused_gemm_sm90_kernel(const __grid_constant__ ptx::TensorMap x_map,
                           const __grid_constant__ ptx::TensorMap weight_map,
                           const __grid_constant__ ptx::TensorMap h_map,
                           const __grid_constant__ ptx::TensorMap up_map,
                           const __grid_constant__ ptx::TensorMap y_map, const FusedGemmWork work) {
  static_assert(kMnMajor || !kMasked, "the masked form takes an MN-major weight only");
  GemmRing<Tile> ring;
  const uint32_t thread = threadIdx.x, warp = ptx::warp_uniform(thread / 32);
  const uint32_t rank = ptx::cluster_rank();
  const auto row_of = [&](RasterPlace at) { return (at.pair * Tile::kCluster + rank) * Tile::kM; };

  if (thread == 0) {
    ring.initialise();
    ptx::barrier_init_fence();
  }
  prefetch_maps(thread, &x_map, &weight_map, &h_map, &up_map, &y_map);
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_decrease<40>();
    if (warp == 0 && ptx::elect_one()) {
      bool waited = false;
#pragma unroll 1
      for (uint32_t item = ptx::cluster_index(); item < work.raster.items();
           item += ptx::cluster_count()) {
        const RasterPlace at = work.raster.place(item);
        const uint32_t row = row_of(at), column = at.column * Tile::kN;
        load_blocks<Tile::kN, kMnMajor>(ring, &x_map, &weight_map, work.blocks_k, row, column);
        if (!waited) ptx::grid_wait_dependency();
        waited = true;
        load_blocks<Tile::kN, kMnMajor>(ring, &h_map, &up_map, work.blocks_r, row, column);
      }
    }
    ptx::warp_sync();
  } else {
    ptx::registers_increase<232>();
    const uint32_t group = warp / 4 - 1;
#pragma unroll 1
    for (uint32_t item = ptx::cluster_index(); item < work.raster.items();
         item += ptx::cluster_count()) {
      const RasterPlace at = work.raster.place(item);
      float acc[Tile::kN / 2];
      compute_tile<T, kMnMajor, kMasked>(acc, ring, &y_map, work, row_of(at), at.column * Tile::kN,
                                         group, thread % 128);
    }
    if (thread % 128 == 0) ptx::tma_store_wait<0>();
    ptx::warp_sync();
  }
  // Neither block leaves while the other may still signal it.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace lora_kernels

// y [M, N] = x [M, K] * weight [N, K]^T + h [M, r] * up [N, r]^T + bias by TMA and wgmma; kMasked:
// with dropout's mask on the LoRA term. Of a group: several such y, or the sum of several.
//
// Persistent clusters of two blocks go through the tiles of y. In each block one thread loads
// stages of x and weight into a ring, then, in the same ring, of h and up: to the accumulators the
// LoRA term is a little more depth, and so is the next product of a sum. Two warpgroups multiply,
// add the bias, round once and store. W0 is loaded once a cluster.
//
// The kernel ahead of it in the stream may still be making h: it is waited for before h is read,
// and for nothing else. csrc/cuda/forward_sm90.cuh needs no kernel ahead of it.
#pragma once
#include "fused_gemm_tile.cuh"

namespace lora_kernels {

// Where a tile is, and which segments make it.
struct GemmPlace {
  uint32_t row, column, output, first, count;
};

template <class Tile>
__device__ __forceinline__ GemmPlace place_of(const FusedGemmGroupWork& work, uint32_t item) {
  const RasterPlace at = work.raster.place(item);
  uint32_t column = at.column;
  const uint32_t output = work.output_at(column), row = at.pair * Tile::kCluster;
  return {(row + ptx::cluster_rank()) * Tile::kM, column * Tile::kN, output,
          output * work.segments_of_output, work.segments_of_output};
}

// Loads the stages of every tile of this cluster.
template <class Tile, bool kMnMajor, class Ring>
__device__ __forceinline__ void load_tiles(Ring& ring, const GemmGroupMaps<ptx::TensorMap>& maps,
                                           const FusedGemmGroupWork& work) {
  bool waited = false;
#pragma unroll 1
  for (uint32_t item = ptx::cluster_index(); item < work.raster.items();
       item += ptx::cluster_count()) {
    const GemmPlace at = place_of<Tile>(work, item);
#pragma unroll 1
    for (uint32_t s = at.first; s < at.first + at.count; ++s) {
      const GemmSegment& segment = work.segment[s];
      const GemmMaps<ptx::TensorMap>& map = maps.each[s];
      load_blocks<Tile::kN, kMnMajor>(ring, &map.x, &map.weight, segment.blocks_k, at.row,
                                      at.column);
      if (!waited) ptx::grid_wait_dependency();
      waited = true;
      load_blocks<Tile::kN, kMnMajor>(ring, &map.h, &map.up, segment.blocks_r, at.row, at.column);
    }
  }
}

template <class Tile, class T, bool kMnMajor, bool kMasked>
__global__ void __cluster_dims__(Tile::kCluster, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    fused_gemm_sm90_kernel(const __grid_constant__ GemmGroupMaps<ptx::TensorMap> maps,
                           const __grid_constant__ FusedGemmGroupWork work) {
  static_assert(kMnMajor || !kMasked, "the masked form takes an MN-major weight only");
  GemmRing<Tile> ring;
  const uint32_t thread = threadIdx.x, warp = ptx::warp_uniform(thread / 32);

  if (thread == 0) {
    ring.initialise();
    ptx::barrier_init_fence();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_decrease<40>();
    if (warp == 0 && ptx::elect_one()) load_tiles<Tile, kMnMajor>(ring, maps, work);
    if (warp == 1 && ptx::elect_one()) {
#pragma unroll 1
      for (uint32_t s = 0; s < work.count; ++s) {
        const GemmMaps<ptx::TensorMap>& map = maps.each[s];
        prefetch_maps(0, &map.x, &map.weight, &map.h, &map.up, &map.y);
      }
    }
    ptx::warp_sync();
  } else {
    ptx::registers_increase<232>();
    const uint32_t group = warp / 4 - 1;
#pragma unroll 1
    for (uint32_t item = ptx::cluster_index(); item < work.raster.items();
         item += ptx::cluster_count()) {
      const GemmPlace at = place_of<Tile>(work, item);
      float acc[Tile::kN / 2];
      compute_tile<T, kMnMajor, kMasked>(acc, ring, &maps.each[at.output].y, work.out[at.output],
                                         work.segment + at.first, at.count, at.row, at.column,
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

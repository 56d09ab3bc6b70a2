// h = scale * dropout(x) * A^T and y = x * W0^T + h * B^T + bias in one launch.
//
// The grid of fused_gemm with some items more (raster.h): chains, each h of a few pairs of row
// blocks. A block publishes its 128 rows of h by a flag; the producer of a tile of the same rows
// waits for that flag just before its first stage of h, which is after all stages of the frozen
// product: by then h has long been there.
//
// Order. Block 0 of a cluster claims items by a ticket, one after another, and tells block 1. It
// asks for the next one when the frozen product of this one is loaded: early enough for the answer
// to be there, late enough for a chain not to lie behind a tile for long. Raster numbers h of a
// pair before every tile that reads it. The kernel ahead zeroes ticket and flags: block 0 waits for
// it before its first ticket, and nothing else needs it earlier.
//
// Progress and determinism: claims.cuh. h and y of an item are sums in one order, each element is
// written once, and what a tile reads of h is complete.
#pragma once
#include "claims.cuh"
#include "dropped_tile.cuh"
#include "forward_work.h"
#include "fused_gemm_sm90.cuh"
#include "store_h.cuh"

namespace lora_kernels {

// Claims items and loads their stages. The first stage of an item carries its number; the last
// stage of all says that there is none.
template <class Tile, int kRank, class Ring>
__device__ __forceinline__ void produce(Ring& ring, Claims<Ring>& claims, const ForwardWork& work,
                                        const ptx::TensorMap* x_map,
                                        const ptx::TensorMap* weight_map,
                                        const ptx::TensorMap* a_map, const ptx::TensorMap* h_map,
                                        const ptx::TensorMap* up_map) {
  const uint32_t rank = ptx::cluster_rank();
  if (rank == 0) {
    ptx::grid_wait_dependency();  // ticket and flags are zero
    claims.ask();
  }
#pragma unroll 1
  for (;;) {
    const uint32_t item = claims.next(rank);
    ring.acquire();
    ptx::store_shared_word(ring.item(), item);
    if (item == kNoItem) {
      ptx::barrier_arrive(ring.full(ring.stage));
      return;
    }
    const RasterPlace at = work.gemm.raster.place(item);
    const uint32_t column = at.column * Tile::kN;
#pragma unroll 1
    for (uint32_t p = 0; p < at.count; ++p) {
      const uint32_t row_block = (at.pair + p) * Tile::kCluster + rank, row = row_block * Tile::kM;
      if (at.is_h) {
        load_blocks<kRank, false>(ring, x_map, a_map, work.gemm.blocks_k, row, 0);
        if (rank == 0 && p + 1 == at.count) claims.ask();
      } else {
        load_blocks<Tile::kN, false>(ring, x_map, weight_map, work.gemm.blocks_k, row, column);
        if (rank == 0) claims.ask();
        wait_for_flag(work.flags + row_block);
        load_blocks<Tile::kN, false>(ring, h_map, up_map, work.gemm.blocks_r, row, column);
      }
    }
  }
}

// sum += 64 rows of the stage at hand times A^T. Still in flight on return: the stage before it is
// free, if there is one.
template <class T, class Ring, int kCount>
__device__ __forceinline__ void multiply_stage(float (&sum)[kCount], Ring& ring, uint32_t block,
                                               uint32_t group, uint32_t lane) {
  ring.wait();
  ptx::wgmma_keep(sum);
  ptx::wgmma_fence();
  LK_UNROLL
  for (uint32_t step = 0; step < kRowElements / kMmaDepth; ++step)
    multiply_step<T, false>(sum, ring, group, step);
  ptx::wgmma_commit();
  ptx::wgmma_keep(sum);
  ptx::wgmma_wait<1>();  // the other sum's stage was multiplied
  if (block > 0) ring.release_previous(lane);
  ring.advance();
}

// The same of dropout(x), which goes through registers; complete on return.
template <class T, class Ring, int kCount>
__device__ __forceinline__ void multiply_dropped_stage(float (&sum)[kCount], Ring& ring,
                                                       const LaneDropout& dropout, uint32_t block,
                                                       uint32_t group, uint32_t warp,
                                                       uint32_t lane) {
  constexpr int kGroup = kCount < 64 ? 4 : 1;  // more fragments would spill
  ring.wait();
  multiply_dropped_tile<T, kGroup>(sum, ring.a() + group * Ring::Tile::kPanelBytes, ring.b(),
                                   dropout, block * kRowElements, warp, lane);
  ring.advance();
  ring.release_previous(lane);
}

// Calls multiply(sum, block) for every stage, in order, with the sum of its parity.
template <int kCount, class Multiply>
__device__ __forceinline__ void multiply_in_turns(float (&even)[kCount], float (&odd)[kCount],
                                                  uint32_t blocks, const Multiply& multiply) {
#pragma unroll 1
  for (uint32_t block = 0; block < blocks; block += 2) {
    multiply(even, block);
    if (block + 1 < blocks) multiply(odd, block + 1);
  }
}

// h of this block's 128 rows, and the flag that says so. Even and odd stages have a sum each, added
// at the end, as in down_proj_sm90: h has the same bits whichever kernel makes it.
template <class T, int kRank, class Ring>
__device__ __forceinline__ void compute_h(Ring& ring, const DownProjArgs& args,
                                          const ForwardWork& work, uint32_t row_block,
                                          uint32_t group, uint32_t thread) {
  const uint32_t lane = thread % 32, warp = thread / 32;
  const int64_t row = int64_t{row_block} * Ring::Tile::kM + group * 64 + warp * 16;
  const uint32_t blocks = work.gemm.blocks_k;
  float even[kRank / 2] = {}, odd[kRank / 2] = {};
  if (args.dropout.seed != nullptr) {
    const LaneDropout dropout = load_dropout(args.dropout, row, lane);
    multiply_in_turns(even, odd, blocks, [&](auto& sum, uint32_t block) {
      multiply_dropped_stage<T>(sum, ring, dropout, block, group, warp, lane);
    });
    ptx::wgmma_keep(even);
  } else {
    multiply_in_turns(even, odd, blocks, [&](auto& sum, uint32_t block) {
      multiply_stage<T>(sum, ring, block, group, lane);
    });
    finish_product(even, ring, lane);
  }
  ptx::wgmma_keep(odd);
  LK_UNROLL
  for (int n = 0; n < kRank / 8; ++n) {
    float block[4];
    LK_UNROLL
    for (int e = 0; e < 4; ++e) block[e] = even[4 * n + e] + odd[4 * n + e];
    store_h<T>(args, true, row, n, block, lane);
  }
  ptx::fence_async_global();  // TMA of other blocks will read it
  ptx::named_barrier_sync<3>(128 * Ring::Tile::kConsumers);
  if (group == 0 && thread == 0) ptx::store_release(work.flags + row_block, 1);
}

template <class Tile, class T, int kRank>
__global__ void __cluster_dims__(Tile::kCluster, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    forward_sm90_kernel(const __grid_constant__ ptx::TensorMap x_map,
                        const __grid_constant__ ptx::TensorMap weight_map,
                        const __grid_constant__ ptx::TensorMap a_map,
                        const __grid_constant__ ptx::TensorMap h_map,
                        const __grid_constant__ ptx::TensorMap up_map,
                        const __grid_constant__ ptx::TensorMap y_map, const DownProjArgs args,
                        const ForwardWork work) {
  static_assert(kRank <= Tile::kN, "A's tile takes the place of the weight's");
  using Ring = GemmRing<Tile>;
  Ring ring;
  Claims<Ring> claims{ring, work.ticket, work.gemm.raster.items()};
  const uint32_t thread = threadIdx.x, warp = ptx::warp_uniform(thread / 32);

  if (thread == 0) {
    ring.initialise();
    claims.initialise();
    ptx::barrier_init_fence();
  }
  prefetch_maps(thread, &x_map, &weight_map, &a_map, &h_map, &up_map, &y_map);
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_decrease<40>();
    if (warp == 0 && ptx::elect_one())
      produce<Tile, kRank>(ring, claims, work, &x_map, &weight_map, &a_map, &h_map, &up_map);
    ptx::warp_sync();
  } else {
    ptx::registers_increase<232>();
    const uint32_t group = warp / 4 - 1, rank = ptx::cluster_rank();
#pragma unroll 1
    for (;;) {
      ring.wait();
      const uint32_t item = ptx::warp_uniform(ptx::load_shared_word(ring.item()));
      if (item == kNoItem) break;
      const RasterPlace at = work.gemm.raster.place(item);
      const uint32_t row_block = at.pair * Tile::kCluster + rank;
      if (at.is_h) {
#pragma unroll 1
        for (uint32_t p = 0; p < at.count; ++p)
          compute_h<T, kRank>(ring, args, work, row_block + p * Tile::kCluster, group,
                              thread % 128);
      } else {
        float acc[Tile::kN / 2];
        compute_tile<T, false, false>(acc, ring, &y_map, work.gemm.out, &work.gemm, 1,
                                      row_block * Tile::kM, at.column * Tile::kN, group,
                                      thread % 128);
      }
    }
    if (thread % 128 == 0) ptx::tma_store_wait<0>();
    ptx::warp_sync();
  }
  // Neither block leaves while the other may still signal it.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace lora_kernels

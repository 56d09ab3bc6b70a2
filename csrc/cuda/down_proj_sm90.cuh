// h [M, r] = scale * dropout(x) [M, K] * down [r, K]^T by TMA and wgmma, for projections that share
// x.
//
// One block computes a part, 64 rows over all of K by a tile of ranks: those of one projection, or
// without dropout of several side by side. Warp 8 loads 64x64 tiles of x and the tile of `down`
// beside them into a ring of stages; two warpgroups take the stages in turns and add their two sums
// at the end, always in the same order. Without dropout wgmma reads x from shared memory; with it,
// x passes through registers, where the mask is drawn.
//
// Parts of the same rows are neighbours in the grid: x comes once from memory, else from L2.
#pragma once
#include "down_proj_work.h"
#include "dropped_tile.cuh"
#include "store_h.cuh"

namespace lora_kernels {

template <class Tile>
struct DownProjRing {
  uint32_t base = ptx::shared_base();
  __device__ uint32_t x(uint32_t s) const { return base + s * Tile::kStageBytes; }
  __device__ uint32_t down(uint32_t s) const { return x(s) + Tile::kXBytes; }
  __device__ uint32_t full(uint32_t s) const { return x(Tile::kStages) + s * 8; }
  __device__ uint32_t empty(uint32_t s) const { return full(Tile::kStages) + s * 8; }
};

// Loads every stage of the block, each as soon as its place is free.
template <class Tile, bool kMnMajor>
__device__ __forceinline__ void load_stages(const DownProjRing<Tile>& ring,
                                            const ptx::TensorMap* x_map,
                                            const DownProjMaps<ptx::TensorMap>& maps,
                                            const DownProjWork& work, const DownProjShare& share,
                                            int row, uint32_t blocks_k) {
  const auto rank = static_cast<int>(share.rank);
  constexpr uint32_t kPanelBytes = kRowElements * kRowBytes;
#pragma unroll 1
  for (uint32_t i = 0; i < blocks_k; ++i) {
    const uint32_t s = i % Tile::kStages, round = i / Tile::kStages;
    const int k = static_cast<int>(i * kRowElements);
    if (round > 0) ptx::barrier_wait(ring.empty(s), (round - 1) & 1);
    ptx::barrier_arrive_expect(ring.full(s), Tile::kStageBytes);
    ptx::tma_load(ring.x(s), x_map, ring.full(s), k, row);
    if constexpr (kMnMajor) {
      LK_UNROLL
      for (int p = 0; p < Tile::kRank / 64; ++p)
        ptx::tma_load(ring.down(s) + p * kPanelBytes, maps.down, ring.full(s), rank + p * 64, k);
    } else {
#pragma unroll 1
      for (int p = share.first; p < share.last; ++p)
        ptx::tma_load(ring.down(s) + work.place[p].column * kRowBytes, maps.down + p, ring.full(s),
                      k, rank);
    }
  }
}

template <class Tile, bool kMnMajor>
__device__ __forceinline__ uint64_t down_descriptor(uint32_t tile, uint32_t step) {
  if constexpr (kMnMajor)
    return mn_major_descriptor(tile + step * kMnMajorStep, kRowElements * kRowBytes);
  else
    return k_major_descriptor(tile + step * kKMajorStep);
}

// sum += the stages `first`, first + 2, ... of x times `down`, both from shared memory.
template <class Tile, class T, bool kMnMajor>
__device__ __forceinline__ void multiply_stages(float (&sum)[Tile::kRank / 2],
                                                const DownProjRing<Tile>& ring, uint32_t first,
                                                uint32_t blocks_k, uint32_t lane) {
  constexpr uint32_t kSteps = kRowElements / kMmaDepth;
#pragma unroll 1
  for (uint32_t i = first; i < blocks_k; i += Tile::kConsumers) {
    const uint32_t s = i % Tile::kStages;
    ptx::barrier_wait(ring.full(s), i / Tile::kStages & 1);
    ptx::wgmma_keep(sum);
    ptx::wgmma_fence();
    LK_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step)
      ptx::wgmma<T, 0, kMnMajor>(sum, k_major_descriptor(ring.x(s) + step * kKMajorStep),
                                 down_descriptor<Tile, kMnMajor>(ring.down(s), step), true);
    ptx::wgmma_commit();
    ptx::wgmma_keep(sum);
    // Loads in flight are what counts, so the stage goes back before the next one is here: the
    // other warpgroup keeps the tensor cores busy meanwhile.
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::barrier_arrive(ring.empty(s));
  }
  ptx::wgmma_keep(sum);
}

// The same with dropout: x goes through registers, and a stage is free once it was multiplied.
template <class Tile, class T>
__device__ __forceinline__ void multiply_dropped_stages(float (&sum)[Tile::kRank / 2],
                                                        const DownProjRing<Tile>& ring,
                                                        uint32_t first, uint32_t blocks_k,
                                                        const LaneDropout& dropout, uint32_t warp,
                                                        uint32_t lane) {
  constexpr int kGroup = Tile::kRank > 128 ? 2 : 4;  // beside 128 accumulators, fewer fragments
#pragma unroll 1
  for (uint32_t i = first; i < blocks_k; i += Tile::kConsumers) {
    const uint32_t s = i % Tile::kStages;
    ptx::barrier_wait(ring.full(s), i / Tile::kStages & 1);
    multiply_dropped_tile<T, kGroup>(sum, ring.x(s), ring.down(s), dropout, i * kRowElements, warp,
                                     lane);
    if (lane == 0) ptx::barrier_arrive(ring.empty(s));
  }
  ptx::wgmma_keep(sum);
}

// Warpgroup 0 adds the sums of warpgroup 1 to its own and writes each projection's h.
template <class Tile, class T>
__device__ __forceinline__ void add_and_store(const DownProjWork& work, const DownProjShare& share,
                                              float (&sum)[Tile::kRank / 2], uint32_t shared,
                                              int64_t row, uint32_t thread) {
  const auto at = [&](int i) { return shared + (i * 128 + thread % 128) * 4; };
  ptx::named_barrier_sync<1>(256);  // all stages were multiplied: their memory is free
  if (thread >= 128) {
    LK_UNROLL
    for (int i = 0; i < Tile::kRank / 2; ++i) ptx::store_shared(at(i), sum[i]);
    ptx::named_barrier_arrive<2>(256);
    return;
  }
  ptx::named_barrier_sync<2>(256);
  LK_UNROLL
  for (int i = 0; i < Tile::kRank / 2; ++i) sum[i] += ptx::load_shared(at(i));
#pragma unroll 1
  for (int p = share.first; p < share.last; ++p) {
    const DownProjArgs args = rank_slice(work.each[p], share.rank, Tile::kRank);
    const int begin = work.place[p].column / 8;
    LK_UNROLL
    for (int n = 0; n < Tile::kRank / 8; ++n) {
      const float block[4] = {sum[4 * n], sum[4 * n + 1], sum[4 * n + 2], sum[4 * n + 3]};
      if (n >= begin)  // past its last rank store_h stores nothing
        store_h<T>(args, work.place[p].h_pairs, row + thread / 32 * 16, n - begin, block,
                   thread % 32);
    }
  }
}

template <class Tile, class T, bool kMnMajor>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    down_proj_sm90_kernel(const __grid_constant__ ptx::TensorMap x_map,
                          const __grid_constant__ DownProjMaps<ptx::TensorMap> down_maps,
                          const __grid_constant__ DownProjWork work) {
  constexpr uint32_t kProducer = 4 * Tile::kConsumers;
  ptx::grid_launch_dependents();  // who needs h waits for it
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  const uint32_t warp = ptx::warp_uniform(thread / 32);
  const DownProjRing<Tile> ring;
  const int64_t row = int64_t{blockIdx.x / work.parts} * Tile::kRows;
  const DownProjShare share = share_of(work, blockIdx.x % work.parts, Tile::kRank);
  const auto blocks_k = static_cast<uint32_t>((work.each[0].K + kRowElements - 1) / kRowElements);

  if (thread == 0) {
    for (uint32_t s = 0; s < Tile::kStages; ++s) {
      ptx::barrier_init(ring.full(s), 1);
      ptx::barrier_init(ring.empty(s), 4);  // the warps of the warpgroup whose stage it was
    }
    ptx::barrier_init_fence();
  }
  ptx::block_sync();

  if (warp == kProducer) {
    if (ptx::elect_one())
      load_stages<Tile, kMnMajor>(ring, &x_map, down_maps, work, share, static_cast<int>(row),
                                  blocks_k);
    return;
  }
  float sum[Tile::kRank / 2] = {};
  const uint32_t first = warp / 4;
  const Dropout& mask = work.each[share.first].dropout;
  if (!kMnMajor && mask.seed != nullptr) {  // the plan gives no other form a mask
    const LaneDropout dropout = load_dropout(mask, row + warp % 4 * 16, lane);
    multiply_dropped_stages<Tile, T>(sum, ring, first, blocks_k, dropout, warp, lane);
  } else {
    multiply_stages<Tile, T, kMnMajor>(sum, ring, first, blocks_k, lane);
  }
  add_and_store<Tile, T>(work, share, sum, ring.base, row, thread);
}

}  // namespace lora_kernels

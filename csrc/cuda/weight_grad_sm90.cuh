// grad [r, K] = scale * h^T dropout(x), and from the same read of x down [M, r] = x down^T and the
// sums of columns, all as partial results in fp32 (reduce.cuh adds them) by TMA and wgmma.
//
// A block keeps a chunk of rows of h in shared memory and goes over a split of x's columns. One
// thread loads stages of 128 rows by 64 columns of x, and beside them the rows of `down`. The
// gradient of 64 columns, over the rows of the chunk, is complete after its stages and is written;
// sums of the down projection stay in registers to the end. With dropout x is masked where it lies:
// for parts with masks of their own the stages of a tile come again for each, out of L2, and of the
// product with all ranks those of the part are kept.
#pragma once
#include "weight_grad_plan.h"
#include "weight_grad_tile.cuh"

namespace lora_kernels {

template <class Tile_>
struct WeightGradRing {
  using Tile = Tile_;
  uint32_t base = ptx::shared_base(), stage = 0, phase = 0;

  __device__ uint32_t a() const { return base + stage * Tile::kStageBytes; }
  __device__ uint32_t b() const { return a() + Tile::kXBytes; }
  __device__ uint32_t h() const { return base + Tile::kStages * Tile::kStageBytes; }
  __device__ uint32_t ones() const { return h() + Tile::kHBytes; }
  __device__ uint32_t full(uint32_t s) const { return ones() + Tile::kOnesBytes + s * 8; }
  __device__ uint32_t empty(uint32_t s) const { return full(Tile::kStages) + s * 8; }
  __device__ uint32_t h_full() const { return empty(Tile::kStages); }

  __device__ void advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ void initialise() const {
    for (uint32_t s = 0; s < Tile::kStages; ++s) {
      ptx::barrier_init(full(s), 1);
      ptx::barrier_init(empty(s), 4 * Tile::kConsumers);
    }
    ptx::barrier_init(h_full(), 1);
  }
  __device__ void acquire() const { ptx::barrier_wait(empty(stage), phase ^ 1); }
  __device__ void wait() const { ptx::barrier_wait(full(stage), phase); }
  __device__ void release_previous(uint32_t lane) const {
    const uint32_t previous = (stage == 0 ? Tile::kStages : stage) - 1;
    if (lane == 0) ptx::barrier_arrive(empty(previous));
  }
};

// A block's share of the work.
struct WeightGradPlace {
  int64_t row, chunk, split;
  uint32_t first_tile, tiles;  // of 64 columns
  uint32_t rank, ranks;        // that it computes, in fours
};

template <class Tile>
__device__ __forceinline__ WeightGradPlace place_of(const WeightGradWork& work) {
  const uint32_t split = blockIdx.y % work.splits, rank = blockIdx.y / work.splits * Tile::kRank;
  const uint32_t first = split * work.tiles_of_split, left = work.tiles - first;
  return {int64_t{blockIdx.x} * Tile::kRows,
          blockIdx.x,
          split,
          first,
          left < work.tiles_of_split ? left : work.tiles_of_split,
          rank,
          work.r - rank < Tile::kRank ? in_fours(work.r - rank) : Tile::kRank};
}

// The ranks of a part that a block computes, counted from the block's first, multiples of 4.
struct RanksOfPart {
  uint32_t first, end;
};

// What both sides of the ring go over for each tile: f(ranks, dropout) for every part that the
// block has ranks of. Without dropout one part stands for all.
template <class F>
__device__ __forceinline__ void for_parts(const WeightGradWork&, const WeightGradPlace& at,
                                          const F& f) {
  f(RanksOfPart{0, at.ranks}, Dropout{});
}
template <class F>
__device__ __forceinline__ void for_parts(const MaskedGradWork& work, const WeightGradPlace& at,
                                          const F& f) {
#pragma unroll 1
  for (uint32_t p = 0; p < work.part_count; ++p) {
    const MaskedPart& part = work.parts[p];
    const uint32_t first = part.first > at.rank ? part.first - at.rank : 0;
    const uint32_t end = part.end > at.rank ? in_fours(part.end - at.rank) : 0;
    const bool sums_alone = work.r == 0;
    if (sums_alone || (first < at.ranks && first < end))
      f(RanksOfPart{first, end < at.ranks ? end : at.ranks}, part.dropout);
  }
}

template <bool kDown, class Ring>
__device__ __forceinline__ void load_pass(Ring& ring, const ptx::TensorMap* x_map,
                                          const ptx::TensorMap* h_map,
                                          const ptx::TensorMap* down_map, const WorkOf<kDown>& work,
                                          const WeightGradPlace& at) {
  using Tile = typename Ring::Tile;
  constexpr uint32_t kRows = Tile::kStageRows;
  const int row = static_cast<int>(at.row), rank = static_cast<int>(at.rank);
  if (work.grad != nullptr) {
    ptx::barrier_arrive_expect(ring.h_full(), Tile::kHBytes);
    LK_UNROLL
    for (int p = 0; p < Tile::kRank / 64; ++p) {
      LK_UNROLL
      for (int sub = 0; sub < Tile::kSubs; ++sub)
        ptx::tma_load(ring.h() + p * Tile::kHPanelBytes + sub * Tile::kXBytes, h_map, ring.h_full(),
                      rank + p * 64, row + sub * static_cast<int>(kRows));
    }
  }
#pragma unroll 1
  for (uint32_t tile = at.first_tile; tile < at.first_tile + at.tiles; ++tile) {
    const int column = static_cast<int>(tile * kRowElements);
    for_parts(work, at, [&](const RanksOfPart&, const Dropout&) {
#pragma unroll 1
      for (int sub = 0; sub < Tile::kSubs; ++sub, ring.advance()) {
        const uint32_t full = ring.full(ring.stage);
        ring.acquire();
        ptx::barrier_arrive_expect(full, kDown ? Tile::kStageBytes : Tile::kXBytes);
        ptx::tma_load(ring.a(), x_map, full, column, row + sub * static_cast<int>(kRows));
        if constexpr (kDown) {
          LK_UNROLL
          for (int p = 0; p < Tile::kRank / 64; ++p)
            ptx::tma_load(ring.b() + p * Tile::kPanelBytes, down_map, full, rank + p * 64, column);
        }
      }
    });
  }
}

template <class Tile, class T, bool kDown>
__device__ __forceinline__ void compute_pass(WeightGradRing<Tile>& ring, const WorkOf<kDown>& work,
                                             const WeightGradPlace& at, uint32_t thread) {
  using Form = PassForm<Tile::kRank, Tile::kSubs, Tile::kStageRows, kDown, !kDown>;
  const uint32_t group = thread / 128, warp = thread / 32 % 4, lane = thread % 32;
  const int64_t row = at.row + group * 64 + warp * 16;
  PassPlace place{ring.h(),
                  Tile::kHPanelBytes,
                  ring.ones(),
                  work.grad != nullptr,
                  work.sums != nullptr && at.rank == 0,  // once for all blocks of ranks
                  {},
                  group,
                  warp,
                  lane};
  float sum[Form::kSums][Form::kSumCount];
  float* const grads = work.grad + at.chunk * work.K * work.pitch + at.rank;
  float* const sums = work.sums + at.chunk * work.K * kSumsPitch;

  if (place.with_grad) ptx::barrier_wait(ring.h_full(), 0);
#pragma unroll 1
  for (uint32_t i = 0, turn = 0; i < at.tiles; ++i) {
    const uint32_t column = (at.first_tile + i) * kRowElements;
    for_parts(work, at, [&](const RanksOfPart& ranks, const Dropout& dropout) {
      if constexpr (Form::kDropout) place.dropout = load_dropout(dropout, row, lane);
      pass_columns<T, Form>(
          sum, ring, place, column, turn++ % 2 == group, i > 0,
          [&](const auto& grad, uint32_t rank) {
            if (rank < ranks.end)
              store_partials(grads + rank, work.pitch, column + warp * 16, work.K,
                             ranks.first > rank ? ranks.first - rank : 0, ranks.end - rank, grad,
                             lane);
          },
          [&](const float (&of_columns)[8]) {
            store_partials(sums, kSumsPitch, column + warp * 16, work.K, 0, kSumsPitch, of_columns,
                           lane);
          });
    });
  }
  if constexpr (kDown) {
    LK_UNROLL
    for (int sub = 0; sub < Tile::kSubs; ++sub)
      store_partials(work.down + at.split * work.M * work.pitch + at.rank, work.pitch,
                     row + sub * Tile::kStageRows, work.M, 0, at.ranks, sum[sub], lane);
  }
}

template <class Tile, class T, bool kDown>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    weight_grad_sm90_kernel(const __grid_constant__ ptx::TensorMap x_map,
                            const __grid_constant__ ptx::TensorMap h_map,
                            const __grid_constant__ ptx::TensorMap down_map,
                            const WorkOf<kDown> work) {
  const uint32_t thread = threadIdx.x, warp = ptx::warp_uniform(thread / 32);
  WeightGradRing<Tile> ring;
  const WeightGradPlace at = place_of<Tile>(work);
  if (thread == 0) {
    ring.initialise();
    ptx::barrier_init_fence();
  }
  if (work.sums != nullptr) write_ones<T>(ring.ones(), thread, Tile::kThreads);
  ptx::block_sync();

  if (warp < 4) {
    ptx::registers_decrease<40>();
    if (warp == 0 && ptx::elect_one()) load_pass<kDown>(ring, &x_map, &h_map, &down_map, work, at);
  } else {
    ptx::registers_increase<232>();
    compute_pass<Tile, T, kDown>(ring, work, at, thread - 128);
  }
}

}  // namespace lora_kernels

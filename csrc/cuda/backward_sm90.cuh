// dx = dy W0 + select(mask, scale dh A, 0), with dh, dB and dA, in one launch: dy is read once
// beside dx's GEMM, and so is x.
//
// The grid of fused_gemm with more kinds of items (backward_order.h). dh of 128 rows is published
// by a flag, for which a tile of dx waits just before its first stage of dh, and an item of x
// before it loads dh. Partial results of dB and dA are counted when they are written; sums wait for
// all of theirs. A chunk of h or dh stays in the panels where tiles stage dx.
//
// Sums are set to zero where an item begins, although its first wgmma does not read them: else
// ptxas keeps the registers of one kind of item alive through the others, and serialises wgmma.
//
// Progress and determinism: claims.cuh. Partial results are over fixed rows and are added in order.
#pragma once
#include "backward_work.h"
#include "claims.cuh"
#include "fused_gemm_tile.cuh"
#include "reduce_rows.cuh"
#include "store_h.cuh"
#include "weight_grad_tile.cuh"

namespace lora_kernels {

constexpr int kPairRows = kClusterRows;  // from a block's rows of a pair to those of the next

// The rows of h or dh that an item keeps, in the staging panels: free once their last stores have
// read them.
template <class Ring, int kRank>
struct ChunkPanels {
  using Tile = typename Ring::Tile;
  // Of 128 rows, which lie as PassForm says.
  static constexpr bool kTurned = kRank < 64;
  static constexpr uint32_t kStage = kTurned ? 2 * kRank * kRowBytes : Tile::kABytes;
  static constexpr uint32_t kBytes = BackwardOrder::kChunkPairs * kStage;
  static_assert(kBytes <= Tile::kStagingBytes, "a chunk takes the place of the staged panels");
  const Ring& ring;
  uint32_t turn = 0;

  __device__ uint32_t begin() const { return ring.panel(0, 0); }
  __device__ uint32_t free() const { return ring.extra() + 24; }
  __device__ uint32_t full() const { return ring.extra() + 32; }
  __device__ void initialise() const {
    ptx::barrier_init(free(), Tile::kConsumers);
    ptx::barrier_init(full(), 1);
  }
  // Behind which stage of an item the producer loads it: it waits there for the consumers to end
  // the item before, so stages ahead of it are what is prefetched. Every item has as many.
  static constexpr uint32_t kBehind = BackwardOrder::kChunkPairs - 1;
  // The producer's side; row blocks of a chunk are two apart, since each block has every other.
  __device__ void load(const ptx::TensorMap* map, uint32_t row) {
    ptx::barrier_wait(free(), turn & 1);
    ptx::barrier_arrive_expect(full(), kBytes);
    LK_UNROLL
    for (uint32_t sub = 0; sub < BackwardOrder::kChunkPairs; ++sub, row += kPairRows) {
      const uint32_t to = begin() + sub * kStage;
      if constexpr (kTurned) {
        ptx::tma_load(to, map, full(), static_cast<int>(row), 0);
        ptx::tma_load(to + kStage / 2, map, full(), static_cast<int>(row + kRowElements), 0);
      } else {
        ptx::tma_load(to, map, full(), 0, static_cast<int>(row));
      }
    }
    ++turn;
  }
  // The consumers'.
  __device__ void wait(uint32_t group, uint32_t thread) {
    sync_warpgroup(group);  // stores of a tile may have been ordinary ones, by all threads
    if (thread == 0) {
      ptx::tma_store_wait_read<0>();
      ptx::barrier_arrive(free());
    }
    ptx::barrier_wait(full(), turn & 1);
    ++turn;
  }
};

struct BackwardMaps {
  const ptx::TensorMap *dy, *weight, *dh, *up, *h, *down, *x;
  const ptx::TensorMap* dh_of_x;  // as items of x keep it
};

// What both sides know of where they are.
template <class Tile>
struct BackwardRows {
  uint32_t rank = ptx::cluster_rank();
  // This block's row block of a pair.
  __device__ uint32_t block(uint32_t pair) const { return pair * Tile::kCluster + rank; }
  __device__ uint32_t of_chunk(uint32_t pair, uint32_t sub) const {
    return block(pair + sub) * Tile::kM;
  }
};

// Stages of dy and B, 64 columns of dy at a time.
template <class Tile, int kRank, class Ring>
__device__ __forceinline__ void load_dy(Ring& ring, ChunkPanels<Ring, kRank>& chunk,
                                        const BackwardMaps& maps, uint32_t blocks, uint32_t pair) {
  const BackwardRows<Tile> rows;
  const uint32_t stages = BackwardOrder::kChunkPairs * blocks;
#pragma unroll 1
  for (uint32_t i = 0; i < stages; ++i, ring.advance()) {
    const uint32_t sub = i % BackwardOrder::kChunkPairs, block = i / BackwardOrder::kChunkPairs;
    ring.acquire();
    load_stage<kRank, !chunk.kTurned>(ring, maps.dy, maps.down, rows.of_chunk(pair, sub), 0,
                                      block * kRowElements);
    if (i == chunk.kBehind) chunk.load(maps.h, rows.of_chunk(pair, 0));
  }
}

// Stages of a slice of x.
template <class Tile, int kRank, class Ring>
__device__ __forceinline__ void load_x(Ring& ring, ChunkPanels<Ring, kRank>& chunk,
                                       const BackwardMaps& maps, const BackwardWork& work,
                                       uint32_t pair, uint32_t slice) {
  const BackwardRows<Tile> rows;
  const uint32_t first = slice * work.blocks_of_slice;
  const uint32_t stages = BackwardOrder::kChunkPairs * (work.end_of_slice(slice) - first);
#pragma unroll 1
  for (uint32_t i = 0; i < stages; ++i, ring.advance()) {
    const uint32_t sub = i % BackwardOrder::kChunkPairs;
    const uint32_t block = first + i / BackwardOrder::kChunkPairs;
    ring.acquire();
    ring.expect(Tile::kABytes);
    ptx::tma_load(ring.a(), maps.x, ring.full(ring.stage), static_cast<int>(block * kRowElements),
                  static_cast<int>(rows.of_chunk(pair, sub)));
    if (i != chunk.kBehind) continue;
    for (uint32_t s = 0; s < BackwardOrder::kChunkPairs; ++s)
      wait_for_flag(work.flags + rows.block(pair + s));
    chunk.load(maps.dh_of_x, rows.of_chunk(pair, 0));
  }
}

// Claims items and loads their stages. The first stage of an item carries its number; an item
// without loads has a stage for that alone, and the last one says that there is none.
template <class Tile, int kRank, class Ring>
__device__ __forceinline__ void produce_backward(Ring& ring, Claims<Ring>& claims,
                                                 ChunkPanels<Ring, kRank>& chunk,
                                                 const BackwardMaps& maps,
                                                 const BackwardWork& work) {
  const BackwardRows<Tile> rows;
  const uint32_t rank = rows.rank, partials = Tile::kCluster * work.order.chunks();
  if (rank == 0) {
    ptx::grid_wait_dependency();  // ticket, flags and counts are zero
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
    const BackwardPlace at = work.order.place(item);
    if (at.what == BackwardItem::dx) {
      const uint32_t row = rows.block(at.tile.pair) * Tile::kM, column = at.tile.column * Tile::kN;
      load_blocks<Tile::kN, true>(ring, maps.dy, maps.weight, work.gemm.blocks_k, row, column);
      if (rank == 0) claims.ask();
      wait_for_flag(work.flags + rows.block(at.tile.pair));
      load_blocks<Tile::kN, true>(ring, maps.dh, maps.up, work.gemm.blocks_r, row, column);
      continue;
    }
    if (at.what == BackwardItem::dy) {
      load_dy<Tile>(ring, chunk, maps, work.gemm.blocks_k, at.tile.pair);
    } else if (at.what == BackwardItem::x) {
      load_x<Tile>(ring, chunk, maps, work, at.index * BackwardOrder::kChunkPairs, at.slice);
    } else {
      wait_for_count(at.what == BackwardItem::sum_b ? work.dy_done : work.x_done + at.slice,
                     partials);
      ptx::barrier_arrive(ring.full(ring.stage));
      ring.advance();
    }
    if (rank == 0) claims.ask();
  }
}

// One consumer thread's place in the block.
struct ConsumerPlace {
  uint32_t rank, group, thread;
  __device__ uint32_t warp() const { return thread / 32; }
  __device__ uint32_t lane() const { return thread % 32; }
};

// Meets the other warpgroup: both are done with the chunk, and have written their results.
__device__ __forceinline__ bool finish_item(const ConsumerPlace& at) {
  ptx::named_barrier_sync<3>(256);
  return at.group == 0 && at.thread == 0;
}

// dh of this block's rows of a chunk, and its part of dB.
template <class Tile, class T, int kRank, class Ring>
__device__ __forceinline__ void compute_dy(Ring& ring, ChunkPanels<Ring, kRank>& chunk,
                                           const BackwardWork& work, uint32_t pair,
                                           const ConsumerPlace& at) {
  using Form = PassForm<kRank, BackwardOrder::kChunkPairs, kPairRows, true, false>;
  const BackwardRows<Tile> rows;
  const PassPlace place{
      chunk.begin(), Form::kSubs * Tile::kABytes, 0, true, false, {}, at.group, at.warp(),
      at.lane()};
  DownProjArgs turned = work.dh;
  turned.h = work.turned_dh;
  float sum[Form::kSums][Form::kSumCount] = {};
  float* const grads = work.db + work.partial(pair, at.rank) * work.sum_b.rows * work.pitch;
  chunk.wait(at.group, at.thread);
#pragma unroll 1
  for (uint32_t block = 0; block < work.gemm.blocks_k; ++block)
    pass_columns<T, Form>(
        sum, ring, place, block * kRowElements, block % 2 == at.group, block > 0,
        [&](const auto& grad, uint32_t) {
          store_partials(grads, work.pitch, block * kRowElements + at.warp() * 16, work.sum_b.rows,
                         0, work.pitch, grad, at.lane());
        },
        [](const float (&)[8]) {});
  LK_UNROLL
  for (int sub = 0; sub < Form::kSubs; ++sub) {
    const int64_t row = rows.of_chunk(pair, sub) + at.group * 64 + at.warp() * 16;
    LK_UNROLL
    for (int n = 0; n < kRank / 8; ++n) {
      const float* s = sum[sub] + 4 * n;
      const float block[4] = {s[0], s[1], s[2], s[3]};
      store_h<T>(work.dh, true, row, n, block, at.lane());
      if constexpr (Form::kTurned) store_h<T>(turned, false, row, n, block, at.lane());
    }
  }
  ptx::fence_async_global();  // TMA of other blocks will read dh
  if (!finish_item(at)) return;
  for (uint32_t sub = 0; sub < Form::kSubs; ++sub)
    ptx::store_release(work.flags + rows.block(pair + sub), 1);
  ptx::add_release(work.dy_done, 1);
}

// This block's part of dA over a chunk of rows and a slice of columns.
template <class Tile, class T, int kRank, class Ring>
__device__ __forceinline__ void compute_x(Ring& ring, ChunkPanels<Ring, kRank>& chunk,
                                          const BackwardWork& work, uint32_t pair, uint32_t slice,
                                          const ConsumerPlace& at) {
  using Form = PassForm<kRank, BackwardOrder::kChunkPairs, kPairRows, false, true>;
  const BackwardRows<Tile> rows;
  PassPlace place{
      chunk.begin(), Form::kSubs * Tile::kABytes, 0, true, false, {}, at.group, at.warp(),
      at.lane()};
  place.dropout = load_dropout(work.gemm.mask,
                               rows.of_chunk(pair, 0) + at.group * 64 + at.warp() * 16, at.lane());
  float none[1][1];
  float* const grads = work.da + work.partial(pair, at.rank) * work.sum_a.rows * work.pitch;
  const uint32_t first = slice * work.blocks_of_slice;
  chunk.wait(at.group, at.thread);
#pragma unroll 1
  for (uint32_t block = first; block < work.end_of_slice(slice); ++block)
    pass_columns<T, Form>(
        none, ring, place, block * kRowElements, block % 2 == at.group, false,
        [&](const auto& grad, uint32_t) {
          store_partials(grads, work.pitch, block * kRowElements + at.warp() * 16, work.sum_a.rows,
                         0, work.pitch, grad, at.lane());
        },
        [](const float (&)[8]) {});
  if (finish_item(at)) ptx::add_release(work.x_done + slice, 1);
}

// Sums number `index` of rows [first, last) of a job, by all consumers of the cluster.
__device__ __forceinline__ void compute_sums(const ReduceJob& job, uint32_t first, uint32_t last,
                                             uint32_t rows, uint32_t index,
                                             const ConsumerPlace& at) {
  const uint32_t begin = first + index * rows, end = begin + rows < last ? begin + rows : last;
  if (begin < end) reduce_rows(job, begin, end, at.rank * 256 + at.group * 128 + at.thread, 512);
}

template <class Tile, class T, int kRank, class Ring>
__device__ __forceinline__ void consume_backward(Ring& ring, ChunkPanels<Ring, kRank>& chunk,
                                                 const ptx::TensorMap* dx_map,
                                                 const BackwardWork& work,
                                                 const ConsumerPlace& at) {
  const BackwardRows<Tile> rows;
#pragma unroll 1
  for (;;) {
    ring.wait();
    const uint32_t item = ptx::warp_uniform(ptx::load_shared_word(ring.item()));
    if (item == kNoItem) return;
    const BackwardPlace place = work.order.place(item);
    const uint32_t pair = place.tile.pair;
    if (place.what == BackwardItem::dx) {
      float acc[Tile::kN / 2];
      compute_tile<T, true, true, true>(acc, ring, dx_map, work.gemm.out, &work.gemm, 1,
                                        rows.block(pair) * Tile::kM, place.tile.column * Tile::kN,
                                        at.group, at.thread);
    } else if (place.what == BackwardItem::dy) {
      compute_dy<Tile, T>(ring, chunk, work, pair, at);
    } else if (place.what == BackwardItem::x) {
      compute_x<Tile, T>(ring, chunk, work, place.index * BackwardOrder::kChunkPairs, place.slice,
                         at);
    } else {
      ring.advance();
      ring.release_previous(at.lane());
      const bool of_b = place.what == BackwardItem::sum_b;
      const uint32_t width = work.blocks_of_slice * kRowElements, first = place.slice * width;
      const auto wide = static_cast<uint32_t>(of_b ? work.sum_b.rows : work.sum_a.rows);
      const uint32_t last = of_b || first + width > wide ? wide : first + width;
      compute_sums(of_b ? work.sum_b : work.sum_a, first, last, work.rows_of_sum, place.index, at);
    }
  }
}

template <class Tile, class T, int kRank>
__global__ void __cluster_dims__(Tile::kCluster, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    backward_sm90_kernel(const __grid_constant__ ptx::TensorMap dy_map,
                         const __grid_constant__ ptx::TensorMap weight_map,
                         const __grid_constant__ ptx::TensorMap dh_map,
                         const __grid_constant__ ptx::TensorMap up_map,
                         const __grid_constant__ ptx::TensorMap dx_map,
                         const __grid_constant__ ptx::TensorMap h_map,
                         const __grid_constant__ ptx::TensorMap down_map,
                         const __grid_constant__ ptx::TensorMap x_map,
                         const __grid_constant__ ptx::TensorMap turned_map,
                         const BackwardWork work) {
  using Ring = GemmRing<Tile>;
  Ring ring;
  Claims<Ring> claims{ring, work.ticket, work.order.items()};
  ChunkPanels<Ring, kRank> chunk{ring};
  const uint32_t thread = threadIdx.x, warp = ptx::warp_uniform(thread / 32);

  if (thread == 0) {
    ring.initialise();
    claims.initialise();
    chunk.initialise();
    ptx::barrier_init_fence();
  }
  prefetch_maps(thread, &dy_map, &weight_map, &dh_map, &up_map, &dx_map, &h_map, &down_map, &x_map,
                &turned_map);
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warp < 4) {
    ptx::registers_decrease<40>();
    const BackwardMaps maps{&dy_map, &weight_map, &dh_map, &up_map,
                            &h_map,  &down_map,   &x_map,  chunk.kTurned ? &turned_map : &dh_map};
    if (warp == 0 && ptx::elect_one()) produce_backward<Tile>(ring, claims, chunk, maps, work);
    ptx::warp_sync();
  } else {
    ptx::registers_increase<232>();
    const ConsumerPlace at{ptx::cluster_rank(), warp / 4 - 1, thread % 128};
    consume_backward<Tile, T>(ring, chunk, &dx_map, work, at);
    if (at.thread == 0) ptx::tma_store_wait<0>();
    ptx::warp_sync();
  }
  // Neither block leaves while the other may still signal it.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace lora_kernels

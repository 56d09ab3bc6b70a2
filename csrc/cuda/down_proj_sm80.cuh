// h [M, r] = scale * dropout(x) [M, K] * down [r, K]^T by cp.async and mma.sync; any layout.
//
// One block computes kRows rows and kRank columns of h over all of K, so nothing is exchanged
// between blocks. Blocks of the same rows are neighbours, and read x once from memory and again
// from L2: a few rows are split so, and more than 128 ranks. The warps split the rows (16 each) and
// the k16 steps of a stage; the sums of the slices are added in order at the end, which keeps the
// result independent of timing. Dropout is applied to x in registers, between ldmatrix and mma.
#pragma once
#include "copy_tile.cuh"
#include "down_proj_plan.h"
#include "dropout.cuh"
#include "store_h.cuh"

namespace lora_kernels {

// Where chunk c of a row of kDepth elements lies: swizzled, so that 8 rows meet 8 bank groups.
template <class Tile>
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * (Tile::kDepth * 2) + ((chunk ^ (row & 7)) * kChunkBytes);
}

// x and down of one stage, `k` elements into the depth.
template <class Tile>
__device__ __forceinline__ void load_stage(uint32_t stage, const TileSource& x,
                                           const TileSource& down, bool mn_major, int64_t block_row,
                                           int64_t k, uint32_t thread) {
  constexpr int kChunks = Tile::kDepth / 8;
  const uint32_t to = stage + Tile::kXBytes;
  load_tile<Tile::kRows, kChunks, Tile::kThreads>(
      x, block_row, k, thread,
      [&](uint32_t row, uint32_t chunk) { return stage + chunk_offset<Tile>(row, chunk); });
  if (mn_major)
    load_tile<Tile::kDepth, Tile::kRank / 8, Tile::kThreads>(
        down, k, 0, thread, [&](uint32_t row, uint32_t chunk) {
          return to + row * Tile::kDownPitch + chunk * kChunkBytes;
        });
  else
    load_tile<Tile::kRank, kChunks, Tile::kThreads>(
        down, 0, k, thread,
        [&](uint32_t row, uint32_t chunk) { return to + chunk_offset<Tile>(row, chunk); });
}

// Two n8 blocks of `down` at columns [16 n, 16 n + 16) of one k16 step: fragments {b0, b1} of each.
template <class Tile>
__device__ __forceinline__ void load_down_fragment(uint32_t (&b)[4], uint32_t tile, bool mn_major,
                                                   uint32_t n, uint32_t step, uint32_t lane) {
  const uint32_t inner = lane % 8, k_half = lane / 8 % 2, n_half = lane / 16;
  if (mn_major)
    ptx::load_matrix_x4_transposed(b, tile + (step * 16 + k_half * 8 + inner) * Tile::kDownPitch +
                                          (n * 2 + n_half) * kChunkBytes);
  else
    ptx::load_matrix_x4(b,
                        tile + chunk_offset<Tile>(n * 16 + n_half * 8 + inner, step * 2 + k_half));
}

// Adds the sums of the other slices of the depth to those of slice 0, in order.
template <class Tile>
__device__ __forceinline__ void add_slices(float (&sum)[Tile::kRank / 8][4], uint32_t shared,
                                           uint32_t warp_m, uint32_t warp_k, uint32_t lane) {
  constexpr uint32_t kSums = Tile::kRank / 2;  // of a lane
  const auto at = [&](uint32_t slice, uint32_t i) {
    return shared + (((slice - 1) * Tile::kWarpsM + warp_m) * kSums + i) * 128 + lane * 4;
  };
  ptx::block_sync();  // the stages are free
  if (warp_k > 0) {
    LK_UNROLL
    for (uint32_t i = 0; i < kSums; ++i) ptx::store_shared(at(warp_k, i), sum[i / 4][i % 4]);
  }
  ptx::block_sync();
  if (warp_k > 0) return;
#pragma unroll 1
  for (uint32_t slice = 1; slice < Tile::kWarpsK; ++slice) {
    LK_UNROLL
    for (uint32_t i = 0; i < kSums; ++i) sum[i / 4][i % 4] += ptx::load_shared(at(slice, i));
  }
}

// sum += one stage, as far as this warp's slice of the depth goes.
template <class Tile, class T>
__device__ __forceinline__ void multiply_stage(float (&sum)[Tile::kRank / 8][4], uint32_t stage,
                                               bool mn_major, const LaneDropout& dropout,
                                               uint32_t k, uint32_t warp_m, uint32_t warp_k,
                                               uint32_t lane) {
  constexpr uint32_t kSteps = Tile::kDepth / kMmaDepth / Tile::kWarpsK;
  static_assert(kSteps <= 4, "a word holds the bits of four fragments");
  const uint32_t kept =
      draw_straddling(dropout, k + warp_k * kMmaDepth, Tile::kWarpsK * kMmaDepth, kSteps, lane);
  LK_UNROLL
  for (uint32_t i = 0; i < kSteps; ++i) {
    const uint32_t step = i * Tile::kWarpsK + warp_k;
    uint32_t a[4], b[4];
    ptx::load_matrix_x4(a,
                        stage + chunk_offset<Tile>(warp_m * 16 + lane % 16, step * 2 + lane / 16));
    if (dropout.on) apply_dropout(a, dropout, k + step * kMmaDepth, kept >> 8 * i);
    LK_UNROLL
    for (uint32_t n = 0; n < Tile::kRank / 16; ++n) {
      load_down_fragment<Tile>(b, stage + Tile::kXBytes, mn_major, n, step, lane);
      ptx::mma_m16n8k16(sum[2 * n], a, b[0], b[1], T{});
      ptx::mma_m16n8k16(sum[2 * n + 1], a, b[2], b[3], T{});
    }
  }
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    down_proj_sm80_kernel(const DownProjArgs all, const DownProjLayout layout) {
  ptx::grid_launch_dependents();  // who needs h waits for it
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  const uint32_t warp_m = thread / 32 % Tile::kWarpsM, warp_k = thread / 32 / Tile::kWarpsM;
  const uint32_t shared = ptx::shared_base();
  const auto rank_blocks = static_cast<uint32_t>((all.r + Tile::kRank - 1) / Tile::kRank);
  const int64_t block_row = int64_t{blockIdx.x / rank_blocks} * Tile::kRows;
  const int64_t first_rank = int64_t{blockIdx.x % rank_blocks} * Tile::kRank;
  const DownProjArgs args = rank_slice(all, first_rank, Tile::kRank);
  const Matrix &x = args.x, &d = args.down;
  const bool mn_major = layout.mn_major;
  const TileSource x_tile{static_cast<const uint16_t*>(x.data),
                          x.row_stride,
                          x.col_stride,
                          args.M,
                          args.K,
                          layout.x_vectors};
  const auto* down = static_cast<const uint16_t*>(d.data);
  const TileSource down_tile =
      mn_major ? TileSource{down, d.col_stride, d.row_stride, args.K, args.r, layout.down_vectors}
               : TileSource{down, d.row_stride, d.col_stride, args.r, args.K, layout.down_vectors};
  const LaneDropout dropout = load_dropout(args.dropout, block_row + warp_m * 16, lane);
  const auto load = [&](uint32_t slot, int64_t k) {
    load_stage<Tile>(shared + slot * Tile::kStageBytes, x_tile, down_tile, mn_major, block_row, k,
                     thread);
  };
  float sum[Tile::kRank / 8][4] = {};

  // The first turns fill the ring. One commit a turn, empty or not, so that group s is always
  // stage s.
  uint32_t slot = 0, next_slot = 0;
#pragma unroll 1
  for (int64_t k = (1 - Tile::kStages) * Tile::kDepth; k < args.K; k += Tile::kDepth) {
    if (k >= 0) {
      // This stage is here, and every warp is done with the one before, whose place the next takes.
      ptx::cp_async_wait<Tile::kStages - 2>();
      ptx::block_sync();
    }
    const int64_t next = k + (Tile::kStages - 1) * Tile::kDepth;
    if (next < args.K) load(next_slot, next);
    ptx::cp_async_commit();
    next_slot = next_slot + 1 == Tile::kStages ? 0 : next_slot + 1;
    if (k < 0) continue;
    multiply_stage<Tile, T>(sum, shared + slot * Tile::kStageBytes, mn_major, dropout,
                            static_cast<uint32_t>(k), warp_m, warp_k, lane);
    slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();

  if constexpr (Tile::kWarpsK > 1) add_slices<Tile>(sum, shared, warp_m, warp_k, lane);
  if (warp_k > 0) return;
  LK_UNROLL
  for (int n = 0; n < Tile::kRank / 8; ++n)
    store_h<T>(args, layout.h_pairs, block_row + warp_m * 16, n, sum[n], lane);
}

// Calls launch(kernel) with the instance that serves the plan; false if none was built.
template <class T, class Launch>
bool with_down_proj_sm80(const DownProjPlan& plan, const Launch& launch) {
  return with_sm80_tile(plan, [&](auto tile) { launch(down_proj_sm80_kernel<decltype(tile), T>); });
}

}  // namespace lora_kernels

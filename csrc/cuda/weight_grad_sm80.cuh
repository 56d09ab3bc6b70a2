// grad [r, K] = scale * h^T dropout(x) and the sums of columns of x by cp.async and mma.sync, as
// partial results in fp32 (reduce.cuh adds them); any layout.
//
// A block keeps the gradient of 128 columns of x, by up to kRank ranks of one part, in registers
// over a chunk of rows; stages of 64 rows of x and of h go by. So only the results leave it, and a
// chunk may be long. A warp computes 16 columns by all ranks: its fragments of x^T are those of x
// transposed, by ldmatrix, or under dropout by movmatrix once the mask is drawn, since a lane's
// draw belongs to what it holds of x as it lies. Blocks of the same x are neighbours in the grid:
// x comes once from memory and again from L2.
#pragma once
#include "copy_tile.cuh"
#include "dropout.cuh"
#include "store_partials.cuh"
#include "weight_grad_plan.h"

namespace lora_kernels {

// Where a chunk of 8 elements of a row of kColumns lies: swizzled, so that 8 rows meet 8 bank
// groups. Narrow rows share a line of 128 bytes.
template <int kColumns>
__device__ __forceinline__ uint32_t place_in_rows(uint32_t row, uint32_t chunk) {
  constexpr uint32_t kChunks = kColumns / 8, kRows = kChunks < 8 ? 8 / kChunks : 1;
  constexpr uint32_t kMask = kChunks < 8 ? kChunks - 1 : 7;
  return (row * kChunks + (chunk ^ (row / kRows & kMask))) * kChunkBytes;
}

// A fragment of x^T: 16 columns of the warp by 16 rows of a stage from `row` on, masked.
__device__ __forceinline__ void load_columns(uint32_t (&a)[4], uint32_t x, uint32_t row,
                                             const LaneDropout& dropout, uint32_t kept,
                                             uint32_t warp, uint32_t lane) {
  constexpr int kColumns = kSm80GradColumns;
  if (!dropout.on) {
    const uint32_t at = row + lane % 8 + lane / 16 * 8;
    ptx::load_matrix_x4_transposed(a, x + place_in_rows<kColumns>(at, warp * 2 + lane / 8 % 2));
    return;
  }
  uint32_t own[4];
  ptx::load_matrix_x4(own, x + place_in_rows<kColumns>(row + lane % 16, warp * 2 + lane / 16));
  apply_dropout(own, below(dropout, row), 0, kept);
  LK_UNROLL
  for (int v = 0; v < 4; ++v) a[v] = ptx::transpose_matrix(own[v / 2 + v % 2 * 2]);
}

// What a block adds up.
struct GradWork {
  bool with_grad, with_sums;
};

// grad [16 columns, ranks] and sums [16 columns] += one stage.
template <class Tile, class T>
__device__ __forceinline__ void multiply_stage(float (&grad)[Tile::kRank / 8][4], float (&sums)[4],
                                               uint32_t stage, const GradWork& work,
                                               const LaneDropout& dropout, uint32_t warp,
                                               uint32_t lane) {
  constexpr uint32_t kSteps = Tile::kDepth / kMmaDepth;
  static_assert(kSteps <= 4, "a word holds the bits of four fragments");
  const uint32_t kept = draw_straddling_below(dropout, kSteps, lane);
  const uint32_t ones = ptx::pack(1.0f, 1.0f, T{});
  LK_UNROLL
  for (uint32_t step = 0; step < kSteps; ++step) {
    uint32_t a[4], b[4];
    load_columns(a, stage, step * kMmaDepth, dropout, kept >> 8 * step, warp, lane);
    if (work.with_sums) ptx::mma_m16n8k16(sums, a, ones, ones, T{});
    if (!work.with_grad) continue;
    LK_UNROLL
    for (uint32_t n = 0; n < Tile::kRank / 16; ++n) {
      ptx::load_matrix_x4_transposed(
          b, stage + Tile::kXBytes +
                 place_in_rows<Tile::kRank>(step * kMmaDepth + lane % 16, n * 2 + lane / 16));
      ptx::mma_m16n8k16(grad[2 * n], a, b[0], b[1], T{});
      ptx::mma_m16n8k16(grad[2 * n + 1], a, b[2], b[3], T{});
    }
  }
}

// A block's share of the work.
struct WeightGradSm80Place {
  int64_t row, end, column;
  int64_t first, last;  // columns of h: from the block's first to the end of its part
  uint32_t part;
  GradWork work;
};

template <class Tile>
__device__ __forceinline__ WeightGradSm80Place place_of(const WeightGradSm80Work& work) {
  const uint32_t strip = blockIdx.x / work.blocks, block = blockIdx.x % work.blocks;
  uint32_t p = 0;
  while (p + 1 < work.part_count && work.parts[p + 1].first_block <= block) ++p;
  const WeightGradSm80Part& part = work.parts[p];
  const int64_t row = blockIdx.y * work.rows, left = work.M - row;
  return {row,
          left < work.rows ? work.M : row + work.rows,
          int64_t{strip} * Tile::kColumns,
          part.first + int64_t{block - part.first_block} * Tile::kRank,
          part.first + part.ranks,
          p,
          {work.grad != nullptr, work.sums != nullptr && block == 0}};  // sums: once for all ranks
}

template <class Tile>
__device__ __forceinline__ void store_sums(const WeightGradSm80Work& work,
                                           const WeightGradSm80Place& at,
                                           const float (&grad)[Tile::kRank / 8][4],
                                           const float (&sums)[4], uint32_t warp, uint32_t lane) {
  const int64_t column = at.column + warp * 16, chunk = blockIdx.y;
  if (at.work.with_sums)
    store_partials(work.sums + chunk * work.K * kSumsPitch, kSumsPitch, column, work.K, 0,
                   kSumsPitch, sums, lane);
  if (!at.work.with_grad) return;
  float* const to = work.grad + chunk * work.K * work.pitch + at.first;
  const int64_t left = at.last - at.first;
  const uint32_t ranks = in_fours(left < Tile::kRank ? static_cast<uint32_t>(left) : Tile::kRank);
  LK_UNROLL
  for (uint32_t n = 0; n < Tile::kRank / 8; ++n)
    if (n * 8 < ranks)
      store_partials(to + n * 8, work.pitch, column, work.K, 0, ranks - n * 8, grad[n], lane);
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    weight_grad_sm80_kernel(const __grid_constant__ WeightGradSm80Work work) {
  ptx::grid_launch_dependents();  // who needs the results waits for them
  const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint32_t shared = ptx::shared_base();
  const WeightGradSm80Place at = place_of<Tile>(work);
  const TileSource x{static_cast<const uint16_t*>(work.x.data),
                     work.x.row_stride,
                     work.x.col_stride,
                     at.end,
                     work.K,
                     work.x_vectors};
  const TileSource h{static_cast<const uint16_t*>(work.h.data),
                     work.h.row_stride,
                     work.h.col_stride,
                     at.end,
                     at.last,
                     work.h_vectors};
  LaneDropout dropout =
      beside(load_dropout(work.parts[at.part].dropout, at.row, lane), at.column + warp * 16);
  const auto load = [&](uint32_t slot, int64_t row) {
    const uint32_t stage = shared + slot * Tile::kStageBytes;
    load_tile<Tile::kDepth, Tile::kColumns / 8, Tile::kThreads>(
        x, row, at.column, thread, [&](uint32_t r, uint32_t chunk) {
          return stage + place_in_rows<Tile::kColumns>(r, chunk);
        });
    if (at.work.with_grad)
      load_tile<Tile::kDepth, Tile::kRank / 8, Tile::kThreads>(
          h, row, at.first, thread, [&](uint32_t r, uint32_t chunk) {
            return stage + Tile::kXBytes + place_in_rows<Tile::kRank>(r, chunk);
          });
  };
  float grad[Tile::kRank / 8][4] = {}, sums[4] = {};

  // The first turns fill the ring. One commit a turn, empty or not, so that group s is always
  // stage s.
  uint32_t slot = 0, next_slot = 0;
#pragma unroll 1
  for (int64_t row = at.row + (1 - Tile::kStages) * Tile::kDepth; row < at.end;
       row += Tile::kDepth) {
    if (row >= at.row) {
      // This stage is here, and every warp is done with the one before, whose place the next takes.
      ptx::cp_async_wait<Tile::kStages - 2>();
      ptx::block_sync();
    }
    const int64_t next = row + (Tile::kStages - 1) * Tile::kDepth;
    if (next < at.end) load(next_slot, next);
    ptx::cp_async_commit();
    next_slot = next_slot + 1 == Tile::kStages ? 0 : next_slot + 1;
    if (row < at.row) continue;
    multiply_stage<Tile, T>(grad, sums, shared + slot * Tile::kStageBytes, at.work, dropout, warp,
                            lane);
    dropout = below(dropout, Tile::kDepth);
    slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  store_sums<Tile>(work, at, grad, sums, warp, lane);
}

// Calls launch(kernel) with the instance that serves the plan; false if none was built.
template <class T, class Launch>
bool with_weight_grad_sm80(const WeightGradPlan& plan, const Launch& launch) {
  return with_weight_grad_sm80_tile(
      plan.rank, [&](auto tile) { launch(weight_grad_sm80_kernel<decltype(tile), T>); });
}

}  // namespace lora_kernels

// h [M, r] = scale * dropout(x) [M, K] * down [r, K]^T by cp.async and mma.sync; any layout.
//
// One block computes kRows rows of h over all of K, so x is read once and nothing is exchanged
// between blocks. Its warps split the rows (16 each) and the k16 steps of a stage; the sums of the
// slices are added in order at the end, which keeps the result independent of timing. Dropout is
// applied to x in registers, between ldmatrix and mma.
#pragma once
#include "down_proj_plan.h"
#include "dropout.cuh"
#include "store_h.cuh"

namespace lora_kernels {

// The 8 elements from (row, col) on along `stride`, of which `valid` exist.
__device__ __forceinline__ void load_elements(uint32_t (&v)[4], const uint16_t* from,
                                              int64_t stride, int valid) {
  LK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < valid ? ptx::load_global(from + 2 * i * stride) : 0;
    const uint32_t high = 2 * i + 1 < valid ? ptx::load_global(from + (2 * i + 1) * stride) : 0;
    v[i] = low | high << 16;
  }
}

// One chunk of 8 elements of m into shared memory: zero where the matrix ends.
__device__ __forceinline__ void load_chunk(uint32_t to, const Matrix& m, int64_t offset,
                                           int64_t stride, int64_t left, bool vectors) {
  const int valid = left < 0 ? 0 : left > 8 ? 8 : static_cast<int>(left);
  const uint16_t* data = static_cast<const uint16_t*>(m.data);
  const uint16_t* from = valid > 0 ? data + offset : data;
  if (vectors) {
    ptx::cp_async_16(to, from, valid * 2);
  } else {
    uint32_t v[4];
    load_elements(v, from, stride, valid);
    ptx::store_shared_x4(to, v);
  }
}

// Where chunk c of a row of kDepth elements lies: swizzled, so that 8 rows meet 8 bank groups.
template <class Tile>
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * (Tile::kDepth * 2) + ((chunk ^ (row & 7)) * kChunkBytes);
}

template <class Tile>
__device__ __forceinline__ void load_stage(uint32_t stage, const DownProjArgs& args,
                                           const DownProjLayout& layout, int64_t block_row,
                                           int64_t k0, uint32_t thread) {
  constexpr uint32_t kChunks = Tile::kDepth / 8, kRankChunks = Tile::kRank / 8;
  for (uint32_t i = thread; i < Tile::kRows * kChunks; i += Tile::kThreads) {
    const uint32_t row = i / kChunks, chunk = i % kChunks;
    const int64_t m = block_row + row, k = k0 + chunk * 8;
    load_chunk(stage + chunk_offset<Tile>(row, chunk), args.x,
               m * args.x.row_stride + k * args.x.col_stride, args.x.col_stride,
               m < args.M ? args.K - k : 0, layout.x_vectors);
  }
  const Matrix& down = args.down;
  const uint32_t to = stage + Tile::kXBytes;
  if (layout.mn_major) {
    for (uint32_t i = thread; i < Tile::kDepth * kRankChunks; i += Tile::kThreads) {
      const uint32_t row = i / kRankChunks, chunk = i % kRankChunks;
      const int64_t k = k0 + row, n = chunk * 8;
      load_chunk(to + row * Tile::kDownPitch + chunk * kChunkBytes, down,
                 k * down.col_stride + n * down.row_stride, down.row_stride,
                 k < args.K ? args.r - n : 0, layout.down_vectors);
    }
  } else {
    for (uint32_t i = thread; i < Tile::kRank * kChunks; i += Tile::kThreads) {
      const uint32_t n = i / kChunks, chunk = i % kChunks;
      const int64_t k = k0 + chunk * 8;
      load_chunk(to + chunk_offset<Tile>(n, chunk), down, n * down.row_stride + k * down.col_stride,
                 down.col_stride, n < args.r ? args.K - k : 0, layout.down_vectors);
    }
  }
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

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    down_proj_sm80_kernel(const DownProjArgs args, const DownProjLayout layout) {
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  const uint32_t warp_m = thread / 32 % Tile::kWarpsM, warp_k = thread / 32 / Tile::kWarpsM;
  const uint32_t shared = ptx::shared_base();
  const int64_t block_row = int64_t{blockIdx.x} * Tile::kRows;
  const int64_t stages = (args.K + Tile::kDepth - 1) / Tile::kDepth;
  const DropoutState dropout = load_dropout(args.dropout);
  float sum[Tile::kRank / 8][4] = {};

  // Fill the ring: one commit a stage, empty or not, so that group s is always stage s.
  LK_UNROLL
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < stages)
      load_stage<Tile>(shared + s * Tile::kStageBytes, args, layout, block_row,
                       int64_t{s} * Tile::kDepth, thread);
    ptx::cp_async_commit();
  }

#pragma unroll 1
  for (int64_t s = 0; s < stages; ++s) {
    // Stage s is here, and every warp is done with stage s - 1, whose place the next one takes.
    ptx::cp_async_wait<Tile::kStages - 2>();
    ptx::block_sync();
    const int64_t next = s + Tile::kStages - 1;
    if (next < stages)
      load_stage<Tile>(shared + static_cast<uint32_t>(next % Tile::kStages) * Tile::kStageBytes,
                       args, layout, block_row, next * Tile::kDepth, thread);
    ptx::cp_async_commit();

    const uint32_t x = shared + static_cast<uint32_t>(s % Tile::kStages) * Tile::kStageBytes;
    LK_UNROLL
    for (uint32_t i = 0; i < Tile::kDepth / kMmaDepth / Tile::kWarpsK; ++i) {
      const uint32_t step = i * Tile::kWarpsK + warp_k;
      uint32_t a[4], b[4];
      ptx::load_matrix_x4(a, x + chunk_offset<Tile>(warp_m * 16 + lane % 16, step * 2 + lane / 16));
      if (dropout.on)
        apply_dropout(a, dropout, block_row + warp_m * 16, s * Tile::kDepth + step * 16, lane);
      LK_UNROLL
      for (uint32_t n = 0; n < Tile::kRank / 16; ++n) {
        load_down_fragment<Tile>(b, x + Tile::kXBytes, layout.mn_major, n, step, lane);
        ptx::mma_m16n8k16(sum[2 * n], a, b[0], b[1], T{});
        ptx::mma_m16n8k16(sum[2 * n + 1], a, b[2], b[3], T{});
      }
    }
  }
  ptx::cp_async_wait<0>();

  if constexpr (Tile::kWarpsK > 1) add_slices<Tile>(sum, shared, warp_m, warp_k, lane);
  if (warp_k > 0) return;
  LK_UNROLL
  for (int n = 0; n < Tile::kRank / 8; ++n)
    store_h<T>(args, layout.h_pairs, block_row + warp_m * 16, n, sum[n], lane);
}

}  // namespace lora_kernels

// The end of decode.cuh: the sums of warps and of blocks become h and y.
//
// A fragment is one lane's four sums of 16 rows of A or W by 8 rows of x; fragments lie in shared
// memory lane by lane, so that whoever adds them up has each as its mma made it. Blocks of a
// cluster read one another's fragments in the order of their parts of K: h all of them, of y each
// its share. Rounded h lies with the rows of x contiguous, as the transposed operand of the up
// projection.
#pragma once
#include "copy_tile.cuh"
#include "decode_plan.h"

namespace lora_kernels {

// A block's place in the problem.
struct DecodePlace {
  int64_t column, end;  // columns of y: of the tile, or none past N
  uint32_t rank;        // in the cluster: which part of K
};

// Where things lie in shared memory once the ring is done.
template <class Tile>
struct DecodeEnd {
  uint32_t shared;

  __device__ __forceinline__ uint32_t sum(uint32_t unit, uint32_t block, uint32_t lane) const {
    return shared + ((unit * Tile::kBlocks + block) * 32 + lane) * 16;
  }
  // Row `rank` of h, rows [8 block, 8 block + 8) of x: 8 ranks meet 8 bank groups.
  __device__ __forceinline__ uint32_t h(uint32_t rank, uint32_t block) const {
    const uint32_t swizzle = rank / (8 / Tile::kBlocks) % Tile::kBlocks;
    static_assert(Tile::kBlocks == 2 || Tile::kBlocks == 8, "8 ranks fill whole turns of banks");
    return shared + Tile::kSumBytes + rank * (Tile::kM * 2) + (block ^ swizzle) * kChunkBytes;
  }
  // Rows of B are padded to an odd number of chunks.
  __device__ __forceinline__ uint32_t up(uint32_t row, uint32_t chunk, uint32_t ranks) const {
    return shared + (Tile::kStages - 1) * Tile::kStageBytes + row * (ranks * 2 + kChunkBytes) +
           chunk * kChunkBytes;
  }
  __device__ __forceinline__ uint32_t bias(uint32_t row) const {
    return shared + Tile::kRingBytes - Tile::kBiasBytes + row * 4;
  }
};

// B and the bias of the tile, zero past its end: loaded like a stage, so that nothing waits for
// them.
template <class Tile, class T>
__device__ __forceinline__ void load_up(const FusedGemmArgs& args, const DecodeWork& work,
                                        const DecodePlace& place, const DecodeEnd<Tile>& end,
                                        uint32_t thread) {
  const Matrix& b = args.up;
  const auto* up = static_cast<const uint16_t*>(b.data);
  const uint32_t tile_n = static_cast<uint32_t>(work.tile_n), chunks = work.ranks / 8;
#pragma unroll 1
  for (uint32_t i = thread; i < tile_n * chunks; i += Tile::kThreads) {
    const uint32_t row = i / chunks, chunk = i % chunks;
    const int64_t n = place.column + row, left = n < place.end ? args.r - chunk * 8 : 0;
    const int valid = left < 0 ? 0 : left > 8 ? 8 : static_cast<int>(left);
    const uint16_t* from =
        valid > 0 ? up + n * b.row_stride + int64_t{chunk} * 8 * b.col_stride : up;
    const uint32_t to = end.up(row, chunk, work.ranks);
    if (work.up_vectors) {
      ptx::cp_async_16(to, from, valid * 2);
    } else {
      uint32_t v[4];
      load_elements(v, from, b.col_stride, valid);
      ptx::store_shared_x4(to, v);
    }
  }
#pragma unroll 1
  for (uint32_t row = thread; row < tile_n; row += Tile::kThreads) {
    const int64_t n = place.column + row;
    const auto* bias = static_cast<const uint16_t*>(args.bias.data);
    const bool exists = bias != nullptr && n < place.end;
    ptx::store_shared(
        end.bias(row),
        exists ? ptx::widen(ptx::load_global(bias + n * args.bias.col_stride), T{}) : 0);
  }
}

// The sums of a block: those of the warps' slices of a stage, added in order.
template <class Tile>
__device__ __forceinline__ void add_warps(const float (&sum)[Tile::kUnits][Tile::kBlocks][4],
                                          const DecodeEnd<Tile>& end, uint32_t warp_n,
                                          uint32_t warp_k, uint32_t lane) {
  LK_UNROLL
  for (uint32_t slice = 0; slice < Tile::kWarpsK; ++slice) {
    if (warp_k == slice) {
      LK_UNROLL
      for (uint32_t i = 0; i < Tile::kUnits * Tile::kBlocks; ++i) {
        const uint32_t unit = i / Tile::kBlocks, block = i % Tile::kBlocks;
        const uint32_t at = end.sum(warp_n * Tile::kUnits + unit, block, lane);
        float total[4] = {};
        if (slice > 0) ptx::load_shared_x4(total, at);
        LK_UNROLL
        for (int e = 0; e < 4; ++e) total[e] += sum[unit][block][e];
        ptx::store_shared_x4(at, total);
      }
    }
    ptx::block_sync();
  }
}

// A fragment of all of K.
__device__ __forceinline__ void load_total(float (&total)[4], uint32_t at, uint32_t splits) {
  if (splits == 1) return ptx::load_shared_x4(total, at);
  float part[kDecodeSplits][4];
  LK_UNROLL
  for (uint32_t rank = 0; rank < kDecodeSplits; ++rank)
    if (rank < splits) ptx::load_shared_remote_x4(part[rank], at, rank);
  LK_UNROLL
  for (int e = 0; e < 4; ++e) {
    total[e] = part[0][e];
    LK_UNROLL
    for (uint32_t rank = 1; rank < kDecodeSplits; ++rank)
      if (rank < splits) total[e] += part[rank][e];
  }
}

// h of the tile, scaled and rounded once; the first tile's first block writes it out.
template <class Tile, class T>
__device__ __forceinline__ void make_h(const DownProjArgs& args, const DecodeWork& work,
                                       const DecodePlace& place, const DecodeEnd<Tile>& end,
                                       uint32_t warp, uint32_t lane) {
  const bool writes = place.column == 0 && place.rank == 0;
  const uint32_t fragments = work.ranks / kUnit * Tile::kBlocks;
#pragma unroll 1
  for (uint32_t i = warp; i < fragments; i += Tile::kWarps) {
    const uint32_t unit = i / Tile::kBlocks, block = i % Tile::kBlocks;
    float total[4];
    load_total(total, end.sum(unit, block, lane), work.splits);
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t rank = unit * kUnit + half * 8 + lane / 4, row = block * 8 + lane % 4 * 2;
      const bool exists = rank < args.r;  // else zero, even where x holds an Inf
      const uint32_t both =
          exists ? ptx::pack(total[2 * half] * args.scale, total[2 * half + 1] * args.scale, T{})
                 : 0;
      ptx::store_shared_word(end.h(rank, block) + lane % 4 * 4, both);
      if (!writes || !exists) continue;
      uint16_t* at =
          static_cast<uint16_t*>(args.h.data) + row * args.h.row_stride + rank * args.h.col_stride;
      if (row < args.M) ptx::store_global(at, static_cast<uint16_t>(both));
      if (row + 1 < args.M)
        ptx::store_global(at + args.h.row_stride, static_cast<uint16_t>(both >> 16));
    }
  }
}

// Calls f(unit, rows) for this warp's pieces of the tile's columns: 16 of them by 16 rows of x.
template <class Tile, class F>
__device__ __forceinline__ void for_share(const DecodeWork& work, const DecodePlace& place,
                                          uint32_t warp, const F& f) {
  constexpr uint32_t kPieces = Tile::kM / kUnit;
  const uint32_t count = work.tile_n / kUnit * kPieces;
#pragma unroll 1
  for (uint32_t i = place.rank + work.splits * warp; i < count; i += work.splits * Tile::kWarps)
    f(i / kPieces, i % kPieces);
}

// Brings the totals of this block's share, which no other block reads, into its own memory.
template <class Tile>
__device__ __forceinline__ void gather_share(const DecodeWork& work, const DecodePlace& place,
                                             const DecodeEnd<Tile>& end, uint32_t warp,
                                             uint32_t lane) {
  for_share<Tile>(work, place, warp, [&](uint32_t unit, uint32_t piece) {
    LK_UNROLL
    for (uint32_t block = 0; block < 2; ++block) {
      const uint32_t at = end.sum(work.ranks / kUnit + unit, piece * 2 + block, lane);
      float total[4];
      load_total(total, at, work.splits);
      ptx::store_shared_x4(at, total);
    }
  });
}

// 16 columns from `n` on of 8 rows from `row` on of y, rounded once.
template <class T>
__device__ __forceinline__ void store_y(const FusedGemmArgs& args, int64_t end, int64_t n,
                                        uint32_t row, const float (&v)[4]) {
  auto* y = static_cast<uint16_t*>(args.y.data);
  LK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t column = n + half * 8;
    if (column >= end) continue;
    const uint32_t both = ptx::pack(v[2 * half], v[2 * half + 1], T{});
    uint16_t* at = y + row * args.y.row_stride + column * args.y.col_stride;
    if (row < args.M) ptx::store_global(at, static_cast<uint16_t>(both));
    if (row + 1 < args.M)
      ptx::store_global(at + args.y.row_stride, static_cast<uint16_t>(both >> 16));
  }
}

// y of this block's share: the frozen product, then the up projection, then the bias.
template <class Tile, class T>
__device__ __forceinline__ void make_y(const FusedGemmArgs& args, const DecodeWork& work,
                                       const DecodePlace& place, const DecodeEnd<Tile>& end,
                                       uint32_t warp, uint32_t lane) {
  for_share<Tile>(work, place, warp, [&](uint32_t unit, uint32_t piece) {
    float lora[2][4] = {};
#pragma unroll 1
    for (uint32_t step = 0; step < work.ranks / kMmaDepth && args.scale != 0; ++step) {
      uint32_t b[4], h[4];
      ptx::load_matrix_x4(b, end.up(unit * kUnit + lane % 16, step * 2 + lane / 16, work.ranks));
      ptx::load_matrix_x4_transposed(h, end.h(step * 16 + lane % 16, piece * 2 + lane / 16));
      ptx::mma_m16n8k16(lora[0], b, h[0], h[1], T{});
      ptx::mma_m16n8k16(lora[1], b, h[2], h[3], T{});
    }
    const uint32_t n = unit * kUnit + lane / 4;
    const float bias[2] = {ptx::load_shared(end.bias(n)), ptx::load_shared(end.bias(n + 8))};
    LK_UNROLL
    for (uint32_t block = 0; block < 2; ++block) {
      float v[4];
      ptx::load_shared_x4(v, end.sum(work.ranks / kUnit + unit, piece * 2 + block, lane));
      LK_UNROLL
      for (int e = 0; e < 4; ++e) v[e] += args.scale * lora[block][e] + bias[e / 2];
      store_y<T>(args, place.end, place.column + n, (piece * 2 + block) * 8 + lane % 4 * 2, v);
    }
  });
}

}  // namespace lora_kernels

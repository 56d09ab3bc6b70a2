// y [M, N] = x [M, K] * weight [N, K]^T + select(mask, h [M, r] * up [N, r]^T) + bias by cp.async
// and mma.sync. Of a group: several such y, or the sum of several.
//
// A block computes one tile of y. Stages of x and weight, 32 deep, go through a ring, and behind
// them, in the same ring, those of h and up: to the accumulators the LoRA term is a little more
// depth. Under dropout the term is multiplied into registers of its own, 16 columns at a time,
// masked and added. Fragments of a k16 step are loaded while the step before is multiplied, over
// the boundaries of stages too.
#pragma once
#include "copy_tile.cuh"
#include "fused_gemm_masked.cuh"
#include "fused_gemm_sm80_work.h"

namespace lora_kernels {

// The place of a thread in its block, of a warp in the tile.
template <class Tile>
struct Sm80Lane {
  uint32_t shared, thread, lane, warp_m, warp_n;
  int64_t row, column;  // of the tile in y

  __device__ uint32_t stage(uint32_t slot) const { return shared + slot * Tile::kStageBytes; }
  __device__ uint32_t first_row() const { return warp_m * Tile::kWarpRows; }
  __device__ uint32_t first_column() const { return warp_n * Tile::kWarpColumns; }
};

// A k16 step of a warp: kRows / 16 fragments of x, kColumns / 16 of two n8 blocks of weight.
template <class Tile>
struct Sm80Fragments {
  uint32_t a[Tile::kWarpRows / 16][4], b[Tile::kWarpColumns / 16][4];
};

// Rows of 32 elements are 64 bytes: two share the 128 that eight chunks of 16 bytes spread over.
__device__ __forceinline__ uint32_t k_major_place(uint32_t row, uint32_t chunk) {
  return row * (kSm80Depth * 2) + (chunk ^ (row / 2 & 3)) * kChunkBytes;
}
template <class Tile>
__device__ __forceinline__ uint32_t mn_major_place(uint32_t k, uint32_t chunk) {
  return k * (Tile::kN * 2) + (chunk ^ (k & 7)) * kChunkBytes;
}

// Stage `number` of a segment: of x and weight, then of h and up.
template <class Tile, bool kMnMajor>
__device__ __forceinline__ void load_sm80_stage(const Sm80Segment& s, const Sm80Output& out,
                                                const Sm80Lane<Tile>& at, uint32_t slot,
                                                uint32_t number) {
  constexpr int kChunks = kSm80Depth / 8;
  uint32_t thread = at.thread;
  ptx::opaque(thread);  // or addresses of all its rows would be kept, and spilled
  const bool frozen = number < s.blocks_k;
  const int64_t k = int64_t{kSm80Depth} * (frozen ? number : number - s.blocks_k);
  const int64_t depth = frozen ? s.K : s.r;
  const TileSource a{
      frozen ? s.x.data : s.h.data, frozen ? s.x.stride : s.h.stride, 1, out.M, depth, true};
  const uint16_t* b = frozen ? s.weight.data : s.up.data;
  const int64_t b_stride = frozen ? s.weight.stride : s.up.stride;
  const uint32_t from = at.stage(slot), to = from + Tile::kABytes;
  load_tile<Tile::kM, kChunks, Tile::kThreads>(
      a, at.row, k, thread,
      [&](uint32_t row, uint32_t chunk) { return from + k_major_place(row, chunk); });
  if constexpr (kMnMajor)
    load_tile<kSm80Depth, Tile::kN / 8, Tile::kThreads>(
        {b, b_stride, 1, depth, out.N, true}, k, at.column, thread,
        [&](uint32_t row, uint32_t chunk) { return to + mn_major_place<Tile>(row, chunk); });
  else
    load_tile<Tile::kN, kChunks, Tile::kThreads>(
        {b, b_stride, 1, out.N, depth, true}, at.column, k, thread,
        [&](uint32_t row, uint32_t chunk) { return to + k_major_place(row, chunk); });
}

// 16 rows of x from row 16 m of the warp's on.
template <class Tile>
__device__ __forceinline__ void load_a_fragment(uint32_t (&a)[4], const Sm80Lane<Tile>& at,
                                                uint32_t slot, uint32_t step, uint32_t m) {
  const uint32_t row = at.first_row() + m * 16 + at.lane % 16;
  ptx::load_matrix_x4(a, at.stage(slot) + k_major_place(row, step * 2 + at.lane / 16));
}
// 16 columns of y from column 16 n of the warp's on.
template <class Tile, bool kMnMajor>
__device__ __forceinline__ void load_b_fragment(uint32_t (&b)[4], const Sm80Lane<Tile>& at,
                                                uint32_t slot, uint32_t step, uint32_t n) {
  const uint32_t from = at.stage(slot) + Tile::kABytes, lane = at.lane;
  const uint32_t column = at.first_column() + n * 16;
  if constexpr (kMnMajor)
    ptx::load_matrix_x4_transposed(
        b, from + mn_major_place<Tile>(step * 16 + lane % 16, column / 8 + lane / 16));
  else
    ptx::load_matrix_x4(
        b, from + k_major_place(column + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
}

template <class Tile, bool kMnMajor>
__device__ __forceinline__ void load_sm80_fragments(Sm80Fragments<Tile>& f,
                                                    const Sm80Lane<Tile>& at, uint32_t slot,
                                                    uint32_t step) {
  LK_UNROLL
  for (uint32_t m = 0; m < Tile::kWarpRows / 16; ++m) load_a_fragment(f.a[m], at, slot, step, m);
  LK_UNROLL
  for (uint32_t n = 0; n < Tile::kWarpColumns / 16; ++n)
    load_b_fragment<Tile, kMnMajor>(f.b[n], at, slot, step, n);
}

template <class Tile>
using Sm80Sums = float[Tile::kWarpRows / 16][Tile::kWarpColumns / 8][4];

template <class T, class Tile>
__device__ __forceinline__ void multiply_fragments(Sm80Sums<Tile>& acc,
                                                   const Sm80Fragments<Tile>& f) {
  LK_UNROLL
  for (uint32_t m = 0; m < Tile::kWarpRows / 16; ++m) {
    LK_UNROLL
    for (uint32_t n = 0; n < Tile::kWarpColumns / 16; ++n) {
      ptx::mma_m16n8k16(acc[m][2 * n], f.a[m], f.b[n][0], f.b[n][1], T{});
      ptx::mma_m16n8k16(acc[m][2 * n + 1], f.a[m], f.b[n][2], f.b[n][3], T{});
    }
  }
}

template <class Tile>
__device__ __forceinline__ void multiply_sums(Sm80Sums<Tile>& acc, float factor) {
  LK_UNROLL
  for (uint32_t i = 0; i < Tile::kWarpRows / 16 * (Tile::kWarpColumns / 8) * 4; ++i)
    (&acc[0][0][0])[i] *= factor;
}

// The ring of one segment: which slot holds the stage at hand, and which takes the next to load.
template <class Tile, bool kMnMajor>
struct Sm80Ring {
  const Sm80Segment& segment;
  const Sm80Output& out;
  const Sm80Lane<Tile>& at;
  uint32_t stages;
  uint32_t slot = 0, next = 0, loaded = 0;

  // One commit a stage, empty or not, so that group s is always stage s.
  __device__ __forceinline__ void load() {
    if (loaded < stages) load_sm80_stage<Tile, kMnMajor>(segment, out, at, next, loaded);
    ptx::cp_async_commit();
    ++loaded;
    next = next + 1 == Tile::kStages ? 0 : next + 1;
  }
  // The stage at hand is here, and every warp is done with the one before, whose place is free.
  __device__ __forceinline__ void wait() const {
    ptx::cp_async_wait<Tile::kStages - 2>();
    ptx::block_sync();
  }
  __device__ __forceinline__ void advance() { slot = slot + 1 == Tile::kStages ? 0 : slot + 1; }
};

// acc += select(mask, scale * h up^T, 0) for the stages that are left; the first is here.
template <class T, class Tile, bool kMnMajor>
__device__ __forceinline__ void add_masked_stages(Sm80Sums<Tile>& acc,
                                                  Sm80Ring<Tile, kMnMajor>& ring,
                                                  const Sm80Segment& s, uint32_t stages) {
  constexpr uint32_t kRows = Tile::kWarpRows / 16, kColumns = Tile::kWarpColumns / 16;
  constexpr uint32_t kSteps = kSm80Depth / 16;
  static_assert(kColumns <= 4, "a word holds the bits of 64 columns");
  const Sm80Lane<Tile>& at = ring.at;
  const LaneDropout dropout = load_dropout(s.mask, at.row + at.first_row(), at.lane);
  uint32_t kept[kRows] = {};
#pragma unroll 1
  for (uint32_t i = 0; i < kRows * kColumns; ++i) {  // one loop: a draw is long code
    const uint32_t m = i / kColumns, n = i % kColumns;
    const uint32_t column = static_cast<uint32_t>(at.column) + at.first_column() + n * 16;
    const uint32_t bits = draw_kept(below(dropout, m * 16), column, at.lane) << 4 * n;
    LK_UNROLL
    for (uint32_t p = 0; p < kRows; ++p) kept[p] |= m == p ? bits : 0;
  }
#pragma unroll 1
  while (true) {
    LK_UNROLL
    for (uint32_t m = 0; m < kRows; ++m) {
      uint32_t a[kSteps][4], b[4];
      LK_UNROLL
      for (uint32_t step = 0; step < kSteps; ++step)
        load_a_fragment(a[step], at, ring.slot, step, m);
      LK_UNROLL
      for (uint32_t n = 0; n < kColumns; ++n) {
        // Also keeps the compiler from loading fragments of all columns ahead, and spilling others.
        if (at.column + at.first_column() + n * 16 >= ring.out.N) break;
        float term[2][4] = {};
        LK_UNROLL
        for (uint32_t step = 0; step < kSteps; ++step) {
          load_b_fragment<Tile, kMnMajor>(b, at, ring.slot, step, n);
          ptx::mma_m16n8k16(term[0], a[step], b[0], b[1], T{});
          ptx::mma_m16n8k16(term[1], a[step], b[2], b[3], T{});
        }
        add_kept(acc[m][2 * n], term, kept[m], n, s.scale);
      }
    }
    ring.load();
    ring.advance();
    if (--stages == 0) break;
    ring.wait();
  }
}

// acc += a frozen product and its LoRA term. A scale of the term enters as (acc / scale + h up^T) *
// scale, in fp32: exact for powers of two, which are what fp16 asks for; under a mask it multiplies
// the term.
template <class T, class Tile, bool kMnMajor>
__device__ __forceinline__ void multiply_sm80_segment(Sm80Sums<Tile>& acc, const Sm80Segment& s,
                                                      const Sm80Output& out,
                                                      const Sm80Lane<Tile>& at) {
  constexpr uint32_t kSteps = kSm80Depth / 16;
  const bool masked = kMnMajor && s.mask.seed != nullptr && s.r > 0,
             scaled = !masked && s.scale != 1.0f;
  const uint32_t all = s.blocks_k + s.blocks_r, plain = masked ? s.blocks_k : all;
  Sm80Ring<Tile, kMnMajor> ring{s, out, at, all};
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) ring.load();
  ring.wait();

  Sm80Fragments<Tile> f[2];
  if (plain > 0) load_sm80_fragments<Tile, kMnMajor>(f[0], at, 0, 0);
#pragma unroll 1
  for (uint32_t stage = 0; stage < plain; ++stage) {
    if (scaled && stage == s.blocks_k) multiply_sums<Tile>(acc, s.inverse);
    LK_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) {
      if (step == 0) ring.load();
      if (step + 1 == kSteps) {
        ring.advance();
        if (stage + 1 < all) ring.wait();
      }
      if (step + 1 < kSteps || stage + 1 < plain)
        load_sm80_fragments<Tile, kMnMajor>(f[(step + 1) % 2], at, ring.slot, (step + 1) % kSteps);
      multiply_fragments<T, Tile>(acc, f[step % 2]);
    }
  }
  if (masked) add_masked_stages<T, Tile, kMnMajor>(acc, ring, s, s.blocks_r);
  if (scaled) multiply_sums<Tile>(acc, s.scale);
  ptx::cp_async_wait<0>();
  ptx::block_sync();  // the ring is free
}

// Two columns of the bias.
template <class T>
__device__ __forceinline__ void add_bias_pair(float (&sum)[4], const Sm80Output& out,
                                              int64_t column, T type) {
  const float low = column < out.N ? ptx::widen(ptx::load_global(out.bias + column), type) : 0;
  const float high =
      column + 1 < out.N ? ptx::widen(ptx::load_global(out.bias + column + 1), type) : 0;
  sum[0] += low, sum[1] += high;
  sum[2] += low, sum[3] += high;
}

// Rounds the tile once, and writes it by way of the ring's memory, in rows.
template <class T, class Tile>
__device__ __forceinline__ void store_sm80_tile(Sm80Sums<Tile>& acc, const Sm80Output& out,
                                                const Sm80Lane<Tile>& at) {
  constexpr uint32_t kPitch = Tile::kN * 2 + kChunkBytes;  // rows 4 banks apart
  constexpr uint32_t kChunks = Tile::kN / 8;
  LK_UNROLL
  for (uint32_t n = 0; n < Tile::kWarpColumns / 8; ++n) {
    const uint32_t column = at.first_column() + n * 8 + at.lane % 4 * 2;
    LK_UNROLL
    for (uint32_t m = 0; m < Tile::kWarpRows / 16; ++m) {
      const uint32_t to = at.shared + (at.first_row() + m * 16 + at.lane / 4) * kPitch + column * 2;
      if (out.bias != nullptr) add_bias_pair(acc[m][n], out, at.column + column, T{});
      ptx::store_shared_word(to, ptx::pack(acc[m][n][0], acc[m][n][1], T{}));
      ptx::store_shared_word(to + 8 * kPitch, ptx::pack(acc[m][n][2], acc[m][n][3], T{}));
    }
  }
  ptx::block_sync();
#pragma unroll 1
  for (uint32_t i = at.thread; i < Tile::kM * kChunks; i += Tile::kThreads) {
    const int64_t row = at.row + i / kChunks, column = at.column + i % kChunks * 8;
    if (row >= out.M || column >= out.N) continue;
    uint32_t v[4];
    ptx::load_shared_x4(v, at.shared + i / kChunks * kPitch + i % kChunks * kChunkBytes);
    uint16_t* to = out.y + row * out.stride + column;
    if (out.vectors && column + 8 <= out.N) {
      ptx::store_global_x4(to, v);
      continue;
    }
    LK_UNROLL
    for (uint32_t e = 0; e < 8; ++e)
      if (column + e < out.N)
        ptx::store_global(to + e, static_cast<uint16_t>(v[e / 2] >> 16 * (e % 2)));
  }
}

template <class Tile, class T, bool kMnMajor>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    fused_gemm_sm80_kernel(const __grid_constant__ FusedGemmSm80Work work) {
  ptx::grid_launch_dependents();  // who needs y waits for it
  const RasterPlace place = work.raster.place(blockIdx.x);
  uint32_t column = place.column;
  const uint32_t output = work.output_at(column), thread = threadIdx.x;
  const uint32_t warp = ptx::warp_uniform(thread / 32);
  const Sm80Lane<Tile> at{ptx::shared_base(),
                          thread,
                          thread % 32,
                          warp / Tile::kWarpsN,
                          warp % Tile::kWarpsN,
                          int64_t{place.pair} * Tile::kM,
                          int64_t{column} * Tile::kN};
  Sm80Sums<Tile> acc = {};
#pragma unroll 1
  for (uint32_t s = 0; s < work.segments_of_output; ++s)
    multiply_sm80_segment<T, Tile, kMnMajor>(
        acc, work.segment[output * work.segments_of_output + s], work.out[output], at);
  store_sm80_tile<T, Tile>(acc, work.out[output], at);
}

// Calls launch(kernel) with the instance that serves the plan.
template <class T, class Launch>
void with_fused_gemm_sm80(const FusedGemmPlan& plan, const Launch& launch) {
  with_fused_gemm_sm80_tile(plan.tile_n, [&](auto tile) {
    using Tile = decltype(tile);
    if (plan.mn_major)
      launch(fused_gemm_sm80_kernel<Tile, T, true>);
    else
      launch(fused_gemm_sm80_kernel<Tile, T, false>);
  });
}

}  // namespace lora_kernels

// A tile of y: multiplied, bias added, rounded once, and out through shared memory.
#pragma once
#include "fused_gemm_masked.cuh"
#include "fused_gemm_work.h"

namespace lora_kernels {

// A bias goes through shared memory: a thread loads two columns of it while the tile is multiplied,
// and finds those of its accumulators there at the end.
__device__ __forceinline__ uint32_t load_bias(const GemmOutput& out, uint32_t column) {
  const uint32_t low = column < out.N ? ptx::load_global(out.bias + column) : 0;
  const uint32_t high = column + 1 < out.N ? ptx::load_global(out.bias + column + 1) : 0;
  return low | high << 16;
}

// `bias`: where the first column of the panel stands.
template <class T>
__device__ __forceinline__ void add_bias(float* acc, uint32_t bias, uint32_t lane) {
  LK_UNROLL
  for (uint32_t n = 0; n < 8; ++n) {
    const uint32_t two = ptx::load_shared_word(bias + n * 16 + lane % 4 * 4);
    const float low = ptx::widen(static_cast<uint16_t>(two), T{});
    const float high = ptx::widen(static_cast<uint16_t>(two >> 16), T{});
    acc[4 * n] += low, acc[4 * n + 1] += high;
    acc[4 * n + 2] += low, acc[4 * n + 3] += high;
  }
}

// The threads of one consumer warpgroup.
__device__ __forceinline__ void sync_warpgroup(uint32_t group) {
  if (group == 0)
    ptx::named_barrier_sync<1>(128);
  else
    ptx::named_barrier_sync<2>(128);
}

// 64 by 64 elements of y from shared memory, where TMA cannot address y.
__device__ __forceinline__ void copy_panel(const GemmOutput& out, uint32_t panel, uint32_t row,
                                           uint32_t column, uint32_t thread) {
#pragma unroll 1
  for (uint32_t i = thread; i < 64 * 32; i += 128) {
    const uint32_t r = row + i / 32, c = column + i % 32 * 2;
    if (r >= out.M || c >= out.N) continue;
    const uint32_t two = ptx::load_shared_word(panel + swizzled(i * 4));
    uint16_t* at = out.y + r * out.y_stride + c;
    ptx::store_global(at, static_cast<uint16_t>(two));
    if (c + 1 < out.N) ptx::store_global(at + 1, static_cast<uint16_t>(two >> 16));
  }
}

// 64 rows of y from `row`, in panels of 64 columns from `column`. A panel's place in shared memory
// is used again once the store that read it last, kStaged panels ago, has done so.
template <class T, class Ring, int kCount>
__device__ __forceinline__ void store_tile(float (&acc)[kCount], const Ring& ring,
                                           const ptx::TensorMap* y_map, const GemmOutput& out,
                                           uint32_t row, uint32_t column, uint32_t group,
                                           uint32_t thread) {
  constexpr uint32_t kStaged = Ring::Tile::kStaged, kPanelCount = 32;
  const uint32_t lane = thread % 32, warp = thread / 32;
  LK_UNROLL
  for (uint32_t p = 0; p < kCount / kPanelCount; ++p, column += 64) {
    const uint32_t panel = ring.panel(group, p % kStaged);
    float* sums = acc + p * kPanelCount;
    if (thread == 0) ptx::tma_store_wait_read<kStaged - 1>();
    sync_warpgroup(group);
    if (out.bias != nullptr) add_bias<T>(sums, ring.bias(group) + p * 128, lane);
    LK_UNROLL
    for (uint32_t n = 0; n < 4; ++n) {
      uint32_t r[4];
      LK_UNROLL
      for (uint32_t i = 0; i < 4; ++i)
        r[i] = ptx::pack(sums[8 * n + 2 * i], sums[8 * n + 2 * i + 1], T{});
      const uint32_t offset =
          (warp * 16 + lane % 16) * kRowBytes + (n * 2 + lane / 16) * kChunkBytes;
      ptx::store_matrix_x4(panel + swizzled(offset), r);
    }
    ptx::fence_async_shared();
    sync_warpgroup(group);
    if (!out.by_tma)
      copy_panel(out, panel, row, column, thread);
    else if (thread == 0)
      ptx::tma_store(y_map, panel, static_cast<int>(column), static_cast<int>(row));
    if (thread == 0) ptx::tma_store_commit();  // or an empty group: panels are counted by them
  }
}

template <int kCount>
__device__ __forceinline__ void multiply_by(float (&acc)[kCount], float factor) {
  LK_UNROLL
  for (int i = 0; i < kCount; ++i) acc[i] *= factor;
}

// acc += a frozen product and its LoRA term. A scale of the term enters as (acc / scale + h up^T) *
// scale, in fp32: exact for powers of two, which are what fp16 asks for; under a mask it multiplies
// the term.
template <class T, bool kMnMajor, bool kMasked, class Ring, int kCount>
__device__ __forceinline__ void multiply_segment(float (&acc)[kCount], Ring& ring,
                                                 const GemmSegment& segment, uint32_t row,
                                                 uint32_t column, uint32_t group, uint32_t thread) {
  const bool scaled = !kMasked && segment.scale != 1.0f;
  const uint32_t lane = thread % 32;
  KeptBits<kCount / 32> kept;
  if constexpr (kMasked) {
    const LaneDropout dropout =
        load_dropout(segment.mask, row + group * 64 + thread / 32 * 16, lane);
    const auto draw = [&](uint32_t n) {
      if (n < kept.kFragments) kept.draw(dropout, column, n, lane);
    };
    multiply_blocks<T, kMnMajor>(acc, ring, segment.blocks_k, group, lane, draw);
#pragma unroll 1
    for (uint32_t n = segment.blocks_k; n < kept.kFragments; ++n) draw(n);
  } else {
    multiply_blocks<T, kMnMajor>(acc, ring, segment.blocks_k, group, lane, [](uint32_t) {});
  }
  if (scaled) {
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(acc);
    multiply_by(acc, segment.inverse);
  }
  if constexpr (!kMasked) multiply_rank<T, kMnMajor>(acc, ring, segment.rank_steps, group, lane);
  finish_product(acc, ring, lane);
  if constexpr (kMasked)
    add_masked_rank<T>(acc, ring, segment.rank_steps, kept, segment.scale, group, thread / 32,
                       lane);
  if (scaled) multiply_by(acc, segment.scale);
}

// A tile of y from its first stage to its stores: the sum of `count` segments. It begins with
// zeros: ptxas serialises wgmma where the first product alone does not add to what is there.
// kMasked, kPlain: which forms of the LoRA term the kernel has; with both the segments tell.
template <class T, bool kMnMajor, bool kMasked, bool kPlain = !kMasked, class Ring>
__device__ __forceinline__ void compute_tile(float (&acc)[Ring::Tile::kN / 2], Ring& ring,
                                             const ptx::TensorMap* y_map, const GemmOutput& out,
                                             const GemmSegment* segments, uint32_t count,
                                             uint32_t row, uint32_t column, uint32_t group,
                                             uint32_t thread) {
  const bool biased = out.bias != nullptr && thread < Ring::Tile::kN / 2;
  const uint32_t bias = biased ? load_bias(out, column + thread * 2) : 0;
  LK_UNROLL
  for (float& a : acc) a = 0;
  const bool masked = kMasked && (!kPlain || segments->mask.seed != nullptr);
#pragma unroll 1
  for (uint32_t s = 0; s < count; ++s) {
    if (masked)
      multiply_segment<T, kMnMajor, kMasked>(acc, ring, segments[s], row, column, group, thread);
    else
      multiply_segment<T, kMnMajor, !kPlain>(acc, ring, segments[s], row, column, group, thread);
  }
  if (biased) ptx::store_shared_word(ring.bias(group) + thread * 4, bias);
  store_tile<T>(acc, ring, y_map, out, row + group * 64, column, group, thread);
}

}  // namespace lora_kernels

// The dropout mask on register fragments: what philox.h draws, for a lane of a warp.
#pragma once
#include "../philox.h"
#include "ptx.cuh"

namespace lora_kernels {

struct DropoutState {
  uint64_t seed, offset;
  int64_t row0, col0;
  uint32_t threshold;  // in both halves
  bool on, aligned;    // aligned: fragments of the local matrix are groups of the global one
};

__device__ __forceinline__ DropoutState load_dropout(const Dropout& d) {
  if (d.seed == nullptr) return {0, 0, 0, 0, 0, false, false};
  const int64_t row = row0(d), col = col0(d);
  return {static_cast<uint64_t>(d.seed[0]),
          static_cast<uint64_t>(d.seed[1]),
          row,
          col,
          d.threshold << 16 | d.threshold,
          true,
          row % 16 == 0 && col % 16 == 0};
}

// Bit e of the result: whether element e of the lane's 8 is kept, each drawn on its own.
__device__ __forceinline__ uint32_t keep_bits(const DropoutState& d, int64_t row, int64_t col,
                                              uint32_t lane) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int e = 0; e < 8; ++e) {
    const int64_t r = d.row0 + row + lane / 4 + e / 2 % 2 * 8;
    const int64_t c = d.col0 + col + lane % 4 * 2 + e % 2 + e / 4 * 8;
    const PhiloxWords w = philox(column_group(c), row_group(r), d.offset, d.seed);
    const bool right = c / 8 % 2 != 0, low = r / 8 % 2 != 0;
    const uint32_t word = right ? (low ? w.v[3] : w.v[2]) : (low ? w.v[1] : w.v[0]);
    const uint32_t bits = word >> (16 * (c % 2)) & kMaskBits;
    kept |= static_cast<uint32_t>(bits >= (d.threshold & 0xffff)) << e;
  }
  return kept;
}

// Selects the 16x16 fragment a, whose first element is (row, col), both multiples of 16.
__device__ __forceinline__ void apply_dropout(uint32_t (&a)[4], const DropoutState& d, int64_t row,
                                              int64_t col, uint32_t lane) {
  if (d.aligned) {
    const PhiloxWords words = philox(column_group(d.col0 + col + lane % 4 * 2),
                                     row_group(d.row0 + row + lane / 4), d.offset, d.seed);
    LK_UNROLL
    for (int v = 0; v < 4; ++v)
      a[v] &= ptx::halves_at_least(words.v[v] & (kMaskBits << 16 | kMaskBits), d.threshold);
  } else {
    const uint32_t kept = keep_bits(d, row, col, lane);
    LK_UNROLL
    for (int v = 0; v < 4; ++v)
      a[v] &= (kept >> (2 * v) & 1 ? 0xffffu : 0u) | (kept >> (2 * v + 1) & 1 ? 0xffff0000u : 0u);
  }
}

}  // namespace lora_kernels

// The dropout mask on register fragments: what philox.h draws, for a lane of a warp.
#pragma once
#include "../philox.h"
#include "ptx.cuh"

namespace lora_kernels {

// What a lane needs to mask the 16x16 fragments of 16 rows.
struct LaneDropout {
  uint64_t seed, offset;
  int64_t row, col0;  // the lane's first row and the local column 0, in the global matrix
  uint32_t row_group, column_group;  // of the lane in the fragment at local column 0, if aligned
  uint32_t threshold;                // in both halves
  bool on, aligned;  // aligned: fragments of the local matrix are groups of the global one
};

// `row`: local, of the fragments' first row, a multiple of 16.
__device__ __forceinline__ LaneDropout load_dropout(const Dropout& d, int64_t row, uint32_t lane) {
  if (d.seed == nullptr) return {0, 0, 0, 0, 0, 0, 0, false, false};
  const int64_t global_row = row0(d) + row + lane / 4, first_col = col0(d);
  return {static_cast<uint64_t>(d.seed[0]),
          static_cast<uint64_t>(d.seed[1]),
          global_row,
          first_col,
          row_group(global_row),
          column_group(first_col + lane % 4 * 2),
          d.threshold << 16 | d.threshold,
          true,
          row0(d) % 16 == 0 && first_col % 16 == 0};
}

// An aligned fragment: one draw for its 8 elements.
__device__ __forceinline__ void apply_aligned_dropout(uint32_t (&a)[4], const LaneDropout& d,
                                                      uint32_t col) {
  const PhiloxWords words = philox(d.column_group + col / 4, d.row_group, d.offset, d.seed);
  LK_UNROLL
  for (int v = 0; v < 4; ++v)
    a[v] &= ptx::halves_at_least(words.v[v] & (kMaskBits << 16 | kMaskBits), d.threshold);
}

// Where a fragment straddles groups each element is drawn on its own: bit 2 v + i for half i of
// register v.
__device__ __forceinline__ uint32_t draw_any_dropout(const LaneDropout& d, uint32_t col,
                                                     uint32_t lane) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int e = 0; e < 8; ++e) {
    const int64_t r = d.row + e / 2 % 2 * 8;
    const int64_t c = d.col0 + col + lane % 4 * 2 + e % 2 + e / 4 * 8;
    const PhiloxWords w = philox(column_group(c), row_group(r), d.offset, d.seed);
    const bool right = c / 8 % 2 != 0, low = r / 8 % 2 != 0;
    const uint32_t word = right ? (low ? w.v[3] : w.v[2]) : (low ? w.v[1] : w.v[0]);
    const uint32_t bits = word >> (16 * (c % 2)) & kMaskBits;
    kept |= static_cast<uint32_t>(bits >= (d.threshold & 0xffff)) << e;
  }
  return kept;
}
__device__ __forceinline__ void select_kept(uint32_t (&a)[4], uint32_t kept) {
  LK_UNROLL
  for (int v = 0; v < 4; ++v)
    a[v] &= (kept >> (2 * v) & 1 ? 0xffffu : 0u) | (kept >> (2 * v + 1) & 1 ? 0xffff0000u : 0u);
}
// The same for `count` fragments, at most four, `apart` columns from one another, 8 bits each: by
// one loop, whose code would else stand beside every fragment. Nothing where fragments are groups.
__device__ __forceinline__ uint32_t draw_straddling(const LaneDropout& d, uint32_t col,
                                                    uint32_t apart, uint32_t count, uint32_t lane) {
  uint32_t kept = 0;
  if (!d.on || d.aligned) return kept;
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) kept |= draw_any_dropout(d, col + i * apart, lane) << 8 * i;
  return kept;
}
// Selects the fragment at local column `col`, a multiple of 16; `kept`: its bits if it straddles.
__device__ __forceinline__ void apply_dropout(uint32_t (&a)[4], const LaneDropout& d, uint32_t col,
                                              uint32_t kept) {
  if (d.aligned)
    apply_aligned_dropout(a, d, col);
  else
    select_kept(a, kept);
}

// The same lane `rows` further down, a multiple of 16.
__device__ __forceinline__ LaneDropout below(LaneDropout d, uint32_t rows) {
  d.row += rows;
  d.row_group += rows / 2;
  return d;
}
// The same lane for the columns from `columns` on, a multiple of 16, as local column 0.
__device__ __forceinline__ LaneDropout beside(LaneDropout d, int64_t columns) {
  d.col0 += columns;
  d.column_group += static_cast<uint32_t>(columns / 4);
  return d;
}

// Of `count` fragments 16 rows below one another at local column 0.
__device__ __forceinline__ uint32_t draw_straddling_below(const LaneDropout& d, uint32_t count,
                                                          uint32_t lane) {
  uint32_t kept = 0;
  if (!d.on || d.aligned) return kept;
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) kept |= draw_any_dropout(below(d, i * 16), 0, lane) << 8 * i;
  return kept;
}

}  // namespace lora_kernels

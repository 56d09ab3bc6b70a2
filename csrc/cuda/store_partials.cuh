// Partial results of a gradient, from accumulators to the workspace, where reduce.cuh finds them.
#pragma once
#include "ptx.cuh"

namespace lora_kernels {

// With the padding of partial results.
__device__ __forceinline__ uint32_t in_fours(uint32_t ranks) { return (ranks + 3) / 4 * 4; }

// 16 rows of partial results from `row` on, as wgmma or mma leaves them, where row < rows:
// columns [first, end) of each, multiples of 4 with the padding.
template <int kCount>
__device__ __forceinline__ void store_partials(float* to, int64_t pitch, int64_t row, int64_t rows,
                                               uint32_t first, uint32_t end,
                                               const float (&sum)[kCount], uint32_t lane) {
  LK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + lane / 4 + half * 8;
    if (r >= rows) continue;
    LK_UNROLL
    for (int n = 0; n < kCount / 4; ++n) {
      const uint32_t column = n * 8 + lane % 4 * 2;
      if (column >= first && column < end)
        ptx::store_global_pair(to + r * pitch + column, sum[4 * n + 2 * half],
                               sum[4 * n + 2 * half + 1]);
    }
  }
}

}  // namespace lora_kernels

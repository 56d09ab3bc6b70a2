// The end of every down projection: scaled, rounded once, written.
#pragma once
#include "../lora.h"
#include "ptx.cuh"

namespace lora_kernels {

// Columns [8 n, 8 n + 8) of 16 rows from `row` on, one mma accumulator a lane.
template <class T>
__device__ __forceinline__ void store_h(const DownProjArgs& args, bool pairs, int64_t row, int n,
                                        const float (&sum)[4], uint32_t lane) {
  const Matrix& h = args.h;
  const int64_t col = n * 8 + lane % 4 * 2;
  LK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + lane / 4 + half * 8;
    if (r >= args.M || col >= args.r) continue;
    uint16_t* at = static_cast<uint16_t*>(h.data) + r * h.row_stride + col * h.col_stride;
    const uint32_t both =
        ptx::pack(sum[2 * half] * args.scale, sum[2 * half + 1] * args.scale, T{});
    if (pairs && col + 1 < args.r) {
      ptx::store_global(reinterpret_cast<uint32_t*>(at), both);
    } else {
      ptx::store_global(at, static_cast<uint16_t>(both));
      if (col + 1 < args.r) ptx::store_global(at + h.col_stride, static_cast<uint16_t>(both >> 16));
    }
  }
}

}  // namespace lora_kernels

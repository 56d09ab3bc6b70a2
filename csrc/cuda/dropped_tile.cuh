// A down projection's product under dropout: x goes through registers, where the mask is drawn.
#pragma once
#include "dropout.cuh"

namespace lora_kernels {

// sum += 64 rows of a 64-deep tile of x, masked, times a K-major tile of kCount * 2 ranks.
// `column`: of x, where the tile starts. Complete on return. kGroup: how many k16 steps are in
// registers at once.
template <class T, int kGroup, int kCount>
__device__ __forceinline__ void multiply_dropped_tile(float (&sum)[kCount], uint32_t x,
                                                      uint32_t down, const LaneDropout& dropout,
                                                      uint32_t column, uint32_t warp,
                                                      uint32_t lane) {
  constexpr uint32_t kSteps = kRowElements / kMmaDepth;
  const uint32_t kept = draw_straddling(dropout, column, kMmaDepth, kSteps, lane);
  LK_UNROLL
  for (uint32_t group = 0; group < kSteps; group += kGroup) {
    uint32_t a[kGroup][4];
    LK_UNROLL
    for (uint32_t j = 0; j < kGroup; ++j) {
      const uint32_t step = group + j;
      const uint32_t offset =
          (warp % 4 * 16 + lane % 16) * kRowBytes + (step * 2 + lane / 16) * kChunkBytes;
      ptx::load_matrix_x4(a[j], x + swizzled(offset));
      apply_dropout(a[j], dropout, column + step * kMmaDepth, kept >> 8 * step);
    }
    LK_UNROLL
    for (uint32_t j = 0; j < kGroup; ++j) ptx::wgmma_keep(a[j]);
    ptx::wgmma_keep(sum);
    ptx::wgmma_fence();
    LK_UNROLL
    for (uint32_t j = 0; j < kGroup; ++j)
      ptx::wgmma<T, 0>(sum, a[j], k_major_descriptor(down + (group + j) * kKMajorStep), true);
    ptx::wgmma_commit();
    ptx::wgmma_keep(sum);
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(sum);
  }
}

}  // namespace lora_kernels

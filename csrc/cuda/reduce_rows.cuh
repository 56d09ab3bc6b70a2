// Adds partial results, each element in the same order on every run. reduce.cuh is the kernel that
// does nothing else.
#pragma once
#include "ptx.cuh"
#include "reduce.h"

namespace lora_kernels {

__device__ __forceinline__ void store_rounded(const Matrix& to, int64_t row, int64_t column,
                                              float value) {
  const int64_t at = row * to.row_stride + column * to.col_stride;
  if (to.dtype == Dtype::f32) return ptx::store_global(static_cast<float*>(to.data) + at, value);
  const uint32_t two = to.dtype == Dtype::bf16 ? ptx::pack(value, 0.0f, ptx::bf16{})
                                               : ptx::pack(value, 0.0f, ptx::f16{});
  ptx::store_global(static_cast<uint16_t*>(to.data) + at, static_cast<uint16_t>(two));
}

// Rows [first, last) of a job by `threads` threads, four columns each at a time.
__device__ __forceinline__ void reduce_rows(const ReduceJob& job, int64_t first, int64_t last,
                                            uint32_t thread, uint32_t threads) {
  constexpr int kInFlight = 8;  // loads, to cover their latency
  const int64_t apart = job.rows * job.pitch;
  const auto fours = static_cast<uint32_t>((job.columns + 3) / 4);
  const auto count = static_cast<uint32_t>(last - first) * fours;  // the plan keeps it below 2^32
#pragma unroll 1
  for (uint32_t i = thread; i < count; i += threads) {
    const int64_t row = first + i / fours;
    const uint32_t column = i % fours * 4;
    const float* from = job.partials + row * job.pitch + column;
    float sum[4] = {};
#pragma unroll 1
    for (int64_t p = 0; p < job.count; p += kInFlight, from += kInFlight * apart) {
      float v[kInFlight][4] = {};
      LK_UNROLL
      for (int j = 0; j < kInFlight; ++j)
        if (p + j < job.count) ptx::load_global_x4(v[j], from + j * apart);
      LK_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        LK_UNROLL
        for (int e = 0; e < 4; ++e) sum[e] += v[j][e];
      }
    }
    LK_UNROLL
    for (int e = 0; e < 4; ++e)
      if (column + e < job.columns) store_rounded(job.to, row, column + e, job.scale * sum[e]);
  }
}

}  // namespace lora_kernels

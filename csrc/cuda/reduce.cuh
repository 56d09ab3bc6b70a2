// Adds partial results, each element in the same order on every run.
#pragma once
#include "ptx.cuh"
#include "reduce.h"

namespace lora_kernels {

__device__ __forceinline__ void store_rounded(const Matrix& to, int64_t row, int64_t column,
                                              float value) {
  const int64_t at = row * to.row_stride + column * to.col_stride;
  if (to.dtype == Dtype::f32)
    return ptx::store_global(static_cast<float*>(to.data) + at, value);
  const uint32_t two = to.dtype == Dtype::bf16 ? ptx::pack(value, 0.0f, ptx::bf16{})
                                               : ptx::pack(value, 0.0f, ptx::f16{});
  ptx::store_global(static_cast<uint16_t*>(to.data) + at, static_cast<uint16_t>(two));
}

// Element i of a job, row by row.
__device__ __forceinline__ void reduce_element(const ReduceJob& job, int64_t i) {
  constexpr int kInFlight = 8;  // loads, to cover their latency
  const int64_t row = i / job.columns, column = i % job.columns, apart = job.rows * job.pitch;
  const float* from = job.partials + row * job.pitch + column;
  float sum = 0;
#pragma unroll 1
  for (int64_t first = 0; first < job.count; first += kInFlight, from += kInFlight * apart) {
    float v[kInFlight];
    LK_UNROLL
    for (int j = 0; j < kInFlight; ++j)
      v[j] = first + j < job.count ? ptx::load_global(from + j * apart) : 0.0f;
    LK_UNROLL
    for (int j = 0; j < kInFlight; ++j) sum += v[j];
  }
  store_rounded(job.to, row, column, job.scale * sum);
}

// Job blockIdx.y.
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const ReduceJobs all) {
  ptx::grid_launch_dependents();  // who needs the results waits for them
  const ReduceJob& job = all.jobs[blockIdx.y];
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x; i < job.rows * job.columns;
       i += int64_t{gridDim.x} * kReduceThreads)
    reduce_element(job, i);
}

}  // namespace lora_kernels

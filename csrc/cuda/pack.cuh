// Copies of matrices into contiguous, zero-padded rows: what TMA cannot address as it lies.
#pragma once
#include "forward_plan.h"
#include "ptx.cuh"

namespace lora_kernels {

// One job a block row, 256 elements a block at a time. A factor is a power of two, so that scaling
// rounds nothing but what leaves the range of normal numbers.
template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackJobs all) {
  const PackJob& job = all.jobs[blockIdx.y];
  const auto* from = static_cast<const uint16_t*>(job.from.data);
  auto* to = static_cast<uint16_t*>(job.to);
  const int64_t elements = job.rows * job.width, step = int64_t{gridDim.x} * kPackThreads;
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < elements; i += step) {
    const int64_t row = i / job.width, column = i % job.width;
    uint16_t bits = 0;
    if (column < job.columns)
      bits = ptx::load_global(from + row * job.from.row_stride + column * job.from.col_stride);
    if (job.scale != 1.0f)
      bits = static_cast<uint16_t>(ptx::pack(ptx::widen(bits, T{}) * job.scale, 0.0f, T{}));
    ptx::store_global(to + i, bits);
  }
}

}  // namespace lora_kernels

// What goes ahead of the kernels that make y: copies of matrices into contiguous, zero-padded rows,
// where TMA cannot address them as they lie, and the zeroing of flags.
#pragma once
#include "forward_plan.h"
#include "ptx.cuh"

namespace lora_kernels {

// Job blockIdx.y; a block copies a row at a time.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackJobs all) {
  const PackJob& job = all.jobs[blockIdx.y];
  const auto* from = static_cast<const uint16_t*>(job.from.data);
  auto* to = static_cast<uint16_t*>(job.to);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < job.height; row += gridDim.x) {
#pragma unroll 1
    for (int64_t column = threadIdx.x; column < job.width; column += kPackThreads) {
      const uint16_t* at = from + row * job.from.row_stride + column * job.from.col_stride;
      ptx::store_global(to + row * job.width + column, row < job.rows && column < job.columns
                                                           ? ptx::load_global(at)
                                                           : uint16_t{0});
    }
  }
}

// The next kernel starts meanwhile, and waits before it takes a ticket.
__global__ void __launch_bounds__(kPackThreads) zero_kernel(uint32_t* words, uint32_t count) {
  ptx::grid_launch_dependents();
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kPackThreads + threadIdx.x; i < count;
       i += gridDim.x * kPackThreads)
    ptx::store_global(words + i, 0u);
}

}  // namespace lora_kernels

// Copies of matrices into contiguous, zero-padded rows: what TMA cannot address as it lies.
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
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
#pragma unroll 1
    for (int64_t column = threadIdx.x; column < job.width; column += kPackThreads) {
      const uint16_t* at = from + row * job.from.row_stride + column * job.from.col_stride;
      ptx::store_global(to + row * job.width + column,
                        column < job.columns ? ptx::load_global(at) : uint16_t{0});
    }
  }
}

}  // namespace lora_kernels

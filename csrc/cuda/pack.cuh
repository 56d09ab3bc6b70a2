// What goes ahead of the kernels that make y: copies of matrices into contiguous, zero-padded rows,
// where TMA cannot address them as they lie, and the zeroing of flags.
#pragma once
#include "forward_plan.h"
#include "ptx.cuh"

namespace lora_kernels {

// Job blockIdx.y; a block copies a piece of a row at a time: a transposed copy may have few rows.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackJobs all) {
  const PackJob& job = all.jobs[blockIdx.y];
  const auto* from = static_cast<const uint16_t*>(job.from.data);
  auto* to = static_cast<uint16_t*>(job.to);
  const int64_t pieces = pieces_of(job);
#pragma unroll 1
  for (int64_t piece = blockIdx.x; piece < job.height * pieces; piece += gridDim.x) {
    const int64_t row = piece / pieces, first = piece % pieces * kPieceColumns;
    const int64_t end = first + kPieceColumns < job.width ? first + kPieceColumns : job.width;
#pragma unroll 1
    for (int64_t column = first + threadIdx.x; column < end; column += kPackThreads) {
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

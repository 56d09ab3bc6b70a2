// The partial results of a pass, added by a launch of its own.
#pragma once
#include "reduce_rows.cuh"

namespace lora_kernels {

// Job blockIdx.y.
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const ReduceJobs all) {
  ptx::grid_launch_dependents();  // who needs the results waits for them
  const ReduceJob& job = all.jobs[blockIdx.y];
  reduce_rows(job, 0, job.rows, blockIdx.x * kReduceThreads + threadIdx.x,
              gridDim.x * kReduceThreads);
}

}  // namespace lora_kernels

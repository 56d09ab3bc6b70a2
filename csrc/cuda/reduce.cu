// The launcher of reduce.cuh.
#include "reduce.cuh"

#include "weight_grad.h"

namespace lora_kernels {

cudaError_t launch_reduce(const ReduceJobs& jobs, int multiprocessors, cudaStream_t stream) {
  const dim3 grid(reduce_blocks(jobs, multiprocessors), static_cast<unsigned>(jobs.count));
  return launch_kernel(reduce_kernel, grid, kReduceThreads, 0, stream, false, jobs);
}

}  // namespace lora_kernels

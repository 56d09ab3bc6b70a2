// The launcher of pack.cuh.
#include "pack.cuh"

#include "forward.h"
#include "launch.h"

namespace lora_kernels {

cudaError_t launch_pack(const PackJobs& jobs, int multiprocessors, cudaStream_t stream) {
  const dim3 grid(pack_blocks(jobs, multiprocessors), static_cast<unsigned>(jobs.count));
  return launch_kernel(pack_kernel, grid, kPackThreads, 0, stream, false, jobs);
}

cudaError_t launch_zero(uint32_t* words, uint32_t count, cudaStream_t stream) {
  return launch_kernel(zero_kernel, dim3(zero_blocks(count)), kPackThreads, 0, stream, false, words,
                       count);
}

}  // namespace lora_kernels

// The launcher of pack.cuh.
#include "pack.cuh"

#include "forward.h"

namespace lora_kernels {

cudaError_t launch_pack(const PackJobs& jobs, int multiprocessors, cudaStream_t stream) {
  const dim3 grid(pack_blocks(jobs, multiprocessors), static_cast<unsigned>(jobs.count));
  pack_kernel<<<grid, kPackThreads, 0, stream>>>(jobs);
  return cudaGetLastError();
}

cudaError_t launch_zero(uint32_t* words, uint32_t count, cudaStream_t stream) {
  zero_kernel<<<zero_blocks(count), kPackThreads, 0, stream>>>(words, count);
  return cudaGetLastError();
}

}  // namespace lora_kernels

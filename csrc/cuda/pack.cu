// The launcher of pack.cuh.
#include "pack.cuh"

#include "forward.h"

namespace lora_kernels {

cudaError_t launch_pack(const PackJobs& jobs, int multiprocessors, cudaStream_t stream) {
  const dim3 grid(pack_blocks(jobs, multiprocessors), static_cast<unsigned>(jobs.count));
  if (jobs.jobs[0].from.dtype == Dtype::bf16)
    pack_kernel<ptx::bf16><<<grid, kPackThreads, 0, stream>>>(jobs);
  else
    pack_kernel<ptx::f16><<<grid, kPackThreads, 0, stream>>>(jobs);
  return cudaGetLastError();
}

}  // namespace lora_kernels

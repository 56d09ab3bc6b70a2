// The launchers of fused_gemm_sm90.cuh, fused_gemm_sm80.cuh, forward_sm90.cuh and pack.cuh.
#pragma once
#include <cuda_runtime_api.h>

#include "forward_plan.h"

namespace lora_kernels {

// All pointers in args, the seed included, are device pointers, and so is the workspace, of as many
// bytes as the plan says, on a 128-byte boundary. The device is the current one.
cudaError_t launch_fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                              const Target& target, cudaStream_t stream);
cudaError_t launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                           const Target& target, cudaStream_t stream);

cudaError_t launch_pack(const PackJobs& jobs, int multiprocessors, cudaStream_t stream);
cudaError_t launch_zero(uint32_t* words, uint32_t count, cudaStream_t stream);
cudaError_t launch_fused_gemm_sm80(const FusedGemmGroup& group, void* workspace,
                                   cudaStream_t stream);
// `early`: it may start before the launch ahead of it ends, and waits for that before it reads h.
cudaError_t launch_fused_gemm_sm90(const FusedGemmGroup& group, void* workspace, bool early,
                                   cudaStream_t stream);
// Behind launch_zero of its ticket and flags, whose end it does not wait for before it loads.
cudaError_t launch_forward_sm90(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                                cudaStream_t stream);

}  // namespace lora_kernels

#include "forward.h"

#include "down_proj.h"

namespace lora_kernels {
namespace {

// run_forward's launches, on a stream.
struct StreamLauncher {
  int multiprocessors;
  cudaStream_t stream;

  cudaError_t pack(const PackJobs& jobs) { return launch_pack(jobs, multiprocessors, stream); }
  cudaError_t zero(uint32_t* words, uint32_t count) { return launch_zero(words, count, stream); }
  cudaError_t down_proj(const DownProjArgs& args, const DownProjPlan& plan) {
    return launch_down_proj(args, plan, stream);
  }
  cudaError_t fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                         bool early) {
    return launch_fused_gemm_sm90(args, plan, workspace, early, stream);
  }
  cudaError_t forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace) {
    return launch_forward_sm90(args, plan, workspace, stream);
  }
};

}  // namespace

cudaError_t launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                           const Target& target, cudaStream_t stream) {
  StreamLauncher launcher{target.multiprocessors, stream};
  return static_cast<cudaError_t>(run_forward(args, plan, workspace, launcher));
}

cudaError_t launch_fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                              const Target& target, cudaStream_t stream) {
  StreamLauncher launcher{target.multiprocessors, stream};
  return static_cast<cudaError_t>(run_fused_gemm(args, plan, workspace, launcher));
}

}  // namespace lora_kernels

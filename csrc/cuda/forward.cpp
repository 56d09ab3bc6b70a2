#include "forward.h"

#include "stream_launcher.h"

namespace lora_kernels {
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

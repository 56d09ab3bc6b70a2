#include "backward.h"

#include "stream_launcher.h"

namespace lora_kernels {

cudaError_t launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                            const Target& target, cudaStream_t stream) {
  StreamLauncher launcher{target.multiprocessors, stream};
  return static_cast<cudaError_t>(run_backward(args, plan, workspace, launcher));
}

cudaError_t launch_weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan,
                               void* workspace, const Target& target, cudaStream_t stream) {
  StreamLauncher launcher{target.multiprocessors, stream};
  return static_cast<cudaError_t>(run_weight_grad(pass, plan, workspace, launcher));
}

}  // namespace lora_kernels

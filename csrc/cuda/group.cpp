#include "group.h"

#include "stream_launcher.h"

namespace lora_kernels {

cudaError_t launch_forward_group(const ForwardArgs* args, int count, const ForwardGroupPlan& plan,
                                 void* workspace, const Target& target, cudaStream_t stream) {
  StreamLauncher launcher{target.multiprocessors, stream};
  return static_cast<cudaError_t>(run_forward_group(args, count, plan, workspace, launcher));
}

cudaError_t launch_backward_group(const BackwardArgs* args, int count,
                                  const BackwardGroupPlan& plan, void* workspace,
                                  const Target& target, cudaStream_t stream) {
  StreamLauncher launcher{target.multiprocessors, stream};
  return static_cast<cudaError_t>(run_backward_group(args, count, plan, workspace, launcher));
}

}  // namespace lora_kernels

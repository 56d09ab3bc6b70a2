#include "down_proj.h"

namespace lora_kernels {

cudaError_t launch_down_proj(const DownProjArgs& args, const DownProjPlan& plan,
                             cudaStream_t stream) {
  if (plan.kernel == Kernel::none) return cudaSuccess;
  return plan.kernel == Kernel::sm90 ? launch_down_proj_sm90(args, plan, stream)
                                     : launch_down_proj_sm80(args, plan, stream);
}

}  // namespace lora_kernels

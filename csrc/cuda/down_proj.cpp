#include "down_proj.h"

namespace lora_kernels {

cudaError_t launch_down_proj(const DownProjArgs& args, const DownProjPlan& plan,
                             cudaStream_t stream) {
  if (plan.kernel == DownProjKernel::none) return cudaSuccess;
  return plan.kernel == DownProjKernel::sm90 ? launch_down_proj_sm90(args, plan, stream)
                                             : launch_down_proj_sm80(args, plan, stream);
}

}  // namespace lora_kernels

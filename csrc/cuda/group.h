// The launchers of projections that share x.
#pragma once
#include <cuda_runtime_api.h>

#include "backward_group_plan.h"
#include "forward_group_plan.h"

namespace lora_kernels {

// As launch_forward and launch_backward.
cudaError_t launch_forward_group(const ForwardArgs* args, int count, const ForwardGroupPlan& plan,
                                 void* workspace, const Target& target, cudaStream_t stream);
cudaError_t launch_backward_group(const BackwardArgs* args, int count,
                                  const BackwardGroupPlan& plan, void* workspace,
                                  const Target& target, cudaStream_t stream);

}  // namespace lora_kernels

// The launchers of the backward pass.
#pragma once
#include <cuda_runtime_api.h>

#include "backward_plan.h"

namespace lora_kernels {

// As launch_forward: pointers are device pointers, the workspace has as many bytes as the plan
// says.
cudaError_t launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                            const Target& target, cudaStream_t stream);
cudaError_t launch_weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan,
                               void* workspace, const Target& target, cudaStream_t stream);

// Behind launch_zero of its ticket, flags and counts, whose end it does not wait for before it
// starts.
cudaError_t launch_backward_sm90(const BackwardArgs& args, const BackwardPlan& plan,
                                 void* workspace, cudaStream_t stream);

}  // namespace lora_kernels

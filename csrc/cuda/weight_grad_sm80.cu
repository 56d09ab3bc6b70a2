// The launcher of weight_grad_sm80.cuh.
#include "weight_grad_sm80.cuh"

#include "weight_grad.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                         cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidConfiguration;
  with_weight_grad_sm80<T>(plan, [&](auto kernel) {
    error = launch_kernel(kernel, grid_of(plan), plan.threads, plan.shared_bytes, stream, false,
                          sm80_work_of(pass, plan, workspace));
  });
  return error;
}

}  // namespace

cudaError_t launch_weight_grad_sm80(const WeightGradPass& pass, const WeightGradPlan& plan,
                                    void* workspace, cudaStream_t stream) {
  return pass.grad.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(pass, plan, workspace, stream)
                                          : launch_typed<ptx::f16>(pass, plan, workspace, stream);
}

}  // namespace lora_kernels

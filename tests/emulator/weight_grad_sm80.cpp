// The source of the sm_80 kernel, compiled by g++ against the models of ptx.h.
#include "cuda/weight_grad_sm80.cuh"

#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> weight_grad_sm80_body(const WeightGradPass& pass, const WeightGradPlan& plan,
                                            void* workspace) {
  const WeightGradSm80Work work = sm80_work_of(pass, plan, workspace);
  std::function<void()> body;
  with_type(pass.grad.x.dtype, [&](auto type) {
    with_weight_grad_sm80<decltype(type)>(plan, [&](auto kernel) { body = [=] { kernel(work); }; });
  });
  return body;
}

}  // namespace emu

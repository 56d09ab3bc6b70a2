// The sources of weight_grad and of its sums, compiled by g++ against the models of ptx.h.
#include "cuda/weight_grad_sm90.cuh"

#include "cuda/reduce.cuh"
#include "cuda/weight_grad_sm90_dispatch.h"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> weight_grad_body(const WeightGradPass& pass, const WeightGradPlan& plan,
                                       void* workspace) {
  const WeightGradMaps specs = maps_of(pass, plan, workspace);
  const TensorMap x = encode(specs.x), h = encode(specs.h), down = encode(specs.down);
  std::function<void()> body;
  with_type(pass.grad.x.dtype, [&](auto type) {
    with_weight_grad_sm90<decltype(type)>(
        pass, plan, workspace,
        [&](auto kernel, const auto& work) { body = [=] { kernel(x, h, down, work); }; });
  });
  return body;
}

std::function<void()> reduce_body(const ReduceJobs& jobs) {
  return [jobs] { reduce_kernel(jobs); };
}

}  // namespace emu

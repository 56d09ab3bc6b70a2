// The source of the sm_80 kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm80.cuh"

#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> down_proj_sm80_body(const DownProjArgs& args, const DownProjPlan& plan) {
  std::function<void()> body;
  const auto keep = [&](auto kernel) { body = [=] { kernel(args, plan.layout); }; };
  if (args.x.dtype == Dtype::bf16)
    with_down_proj_sm80<Bf16>(plan, keep);
  else
    with_down_proj_sm80<F16>(plan, keep);
  return body;
}

}  // namespace emu

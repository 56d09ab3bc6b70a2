// The source of the sm_80 kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm80.cuh"

#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> down_proj_sm80_body(const DownProjArgs& args, const DownProjPlan& plan) {
  std::function<void()> body;
  with_sm80_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    if (args.x.dtype == Dtype::bf16)
      body = [args, layout = plan.layout] { down_proj_sm80_kernel<Tile, Bf16>(args, layout); };
    else
      body = [args, layout = plan.layout] { down_proj_sm80_kernel<Tile, F16>(args, layout); };
  });
  return body;
}

}  // namespace emu

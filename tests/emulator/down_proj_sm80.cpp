// The source of the sm_80 kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm80.cuh"

#include "kernels.h"

namespace emu {

using namespace lora_kernels;

namespace {

template <class T>
std::function<void()> typed_body(const DownProjArgs& args, const DownProjPlan& plan) {
  std::function<void()> body;
  const bool mn_major = plan.layout.mn_major, pairs = plan.layout.h_pairs;
  with_sm80_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    if (plan.layout.x_vectors && plan.layout.down_vectors)
      body = [=] { down_proj_sm80_kernel<Tile, T, true>(args, mn_major, pairs); };
    else
      body = [=] { down_proj_sm80_kernel<Tile, T, false>(args, mn_major, pairs); };
  });
  return body;
}

}  // namespace

std::function<void()> down_proj_sm80_body(const DownProjArgs& args, const DownProjPlan& plan) {
  return args.x.dtype == Dtype::bf16 ? typed_body<Bf16>(args, plan) : typed_body<F16>(args, plan);
}

}  // namespace emu

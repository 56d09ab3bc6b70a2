// The source of the sm_90a kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm90.cuh"

#include "cuda/down_proj_sm90_dispatch.h"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> down_proj_sm90_body(const DownProjArgs& args, const DownProjPlan& plan) {
  const TensorMap x = encode(x_map_spec(args, plan)), down = encode(down_map_spec(args, plan));
  const bool dropout = args.dropout.seed != nullptr;
  std::function<void()> body;
  with_type(args.x.dtype, [&](auto type) {
    with_down_proj_sm90<decltype(type)>(plan, dropout, [&](auto kernel) {
      body = [=] { kernel(x, down, args, plan.layout.h_pairs); };
    });
  });
  return body;
}

}  // namespace emu

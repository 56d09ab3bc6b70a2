// The source of the sm_90a kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm90.cuh"

#include "cuda/down_proj_sm90_dispatch.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> down_proj_sm90_body(const DownProjArgs& args, const DownProjPlan& plan) {
  const auto encode = [](const TensorMapSpec& s) {
    return make_tensor_map(
        {s.data, s.columns, s.rows, s.row_stride, static_cast<int>(kRowElements), s.box_rows});
  };
  const TensorMap x = encode(x_map_spec(args, plan)), down = encode(down_map_spec(args, plan));
  const bool dropout = args.dropout.seed != nullptr;
  std::function<void()> body;
  const auto keep = [&](auto kernel) {
    body = [=] { kernel(x, down, args, plan.layout.h_pairs); };
  };
  if (args.x.dtype == Dtype::bf16)
    with_down_proj_sm90<Bf16>(plan, dropout, keep);
  else
    with_down_proj_sm90<F16>(plan, dropout, keep);
  return body;
}

}  // namespace emu

// The source of the sm_90a kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm90.cuh"

#include "kernels.h"

namespace emu {
namespace {

using namespace lora_kernels;

TensorMap encode(const TensorMapSpec& s) {
  return make_tensor_map(
      {s.data, s.columns, s.rows, s.row_stride, static_cast<int>(kRowElements), s.box_rows});
}

template <class T>
std::function<void()> typed_body(const DownProjArgs& args, const DownProjPlan& plan) {
  std::function<void()> body;
  const TensorMap x = encode(x_map_spec(args, plan)), down = encode(down_map_spec(args, plan));
  const bool pairs = plan.layout.h_pairs;
  with_sm90_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    if (plan.layout.mn_major) {
      if constexpr (Tile::kRank >= 64)
        body = [=] { down_proj_sm90_kernel<Tile, T, true, false>(x, down, args, pairs); };
    } else if (args.dropout.seed != nullptr) {
      body = [=] { down_proj_sm90_kernel<Tile, T, false, true>(x, down, args, pairs); };
    } else {
      body = [=] { down_proj_sm90_kernel<Tile, T, false, false>(x, down, args, pairs); };
    }
  });
  return body;
}

}  // namespace

std::function<void()> down_proj_sm90_body(const DownProjArgs& args, const DownProjPlan& plan) {
  return args.x.dtype == Dtype::bf16 ? typed_body<Bf16>(args, plan) : typed_body<F16>(args, plan);
}

}  // namespace emu

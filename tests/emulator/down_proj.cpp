// The source of the down_proj kernels, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_plan.cpp"
#include "cuda/down_proj_sm80.cuh"
#include "cuda/down_proj_sm90.cuh"
#include "kernels.h"

namespace emu {
namespace {

using namespace lora_kernels;

TensorMap encode(const TensorMapSpec& s) {
  return {s.data, s.columns, s.rows, s.row_stride, static_cast<int>(kRowElements), s.box_rows};
}

template <class T>
std::function<void()> sm80_body(const DownProjArgs& args, const DownProjPlan& plan) {
  std::function<void()> body;
  with_sm80_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    body = [args, layout = plan.layout] { down_proj_sm80_kernel<Tile, T>(args, layout); };
  });
  return body;
}

template <class T>
std::function<void()> sm90_body(const DownProjArgs& args, const DownProjPlan& plan) {
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

template <class T>
Launch launch(const DownProjArgs& args, const DownProjPlan& plan) {
  const bool sm90 = plan.kernel == DownProjKernel::sm90;
  Launch l;
  l.name = sm90 ? "down_proj_sm90" : "down_proj_sm80";
  l.body = sm90 ? sm90_body<T>(args, plan) : sm80_body<T>(args, plan);
  if (!l.body) throw Error(l.name + ": no kernel was built for this plan");
  l.grid_x = static_cast<unsigned>(plan.blocks);
  l.threads = static_cast<unsigned>(plan.threads);
  l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
  return l;
}

}  // namespace

std::vector<Launch> down_proj_launches(const DownProjArgs& args, int compute, int multiprocessors) {
  std::vector<Launch> launches;
  for (int64_t first = 0; first < args.r; first += kMaxRank) {
    const DownProjArgs slice = rank_slice(args, first);
    const DownProjPlan plan = plan_down_proj(slice, compute, multiprocessors);
    if (plan.kernel == DownProjKernel::none) continue;
    launches.push_back(args.x.dtype == Dtype::bf16 ? launch<Bf16>(slice, plan)
                                                   : launch<F16>(slice, plan));
    launches.back().after = static_cast<int>(launches.size()) - 2;
  }
  return launches;
}

}  // namespace emu

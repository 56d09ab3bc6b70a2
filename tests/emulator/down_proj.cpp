#include "cuda/down_proj_plan.cpp"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::vector<Launch> down_proj_launches(const DownProjArgs& args, int compute, int multiprocessors) {
  std::vector<Launch> launches;
  for (int64_t first = 0; first < args.r; first += kMaxRank) {
    const DownProjArgs slice = rank_slice(args, first);
    const DownProjPlan plan = plan_down_proj(slice, compute, multiprocessors);
    if (plan.kernel == DownProjKernel::none) continue;
    const bool sm90 = plan.kernel == DownProjKernel::sm90;
    Launch l;
    l.name = sm90 ? "down_proj_sm90" : "down_proj_sm80";
    l.body = sm90 ? down_proj_sm90_body(slice, plan) : down_proj_sm80_body(slice, plan);
    if (!l.body) throw Error(l.name + ": no kernel was built for this plan");
    l.grid_x = static_cast<unsigned>(plan.blocks);
    l.threads = static_cast<unsigned>(plan.threads);
    l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
    l.after = static_cast<int>(launches.size()) - 1;
    launches.push_back(std::move(l));
  }
  return launches;
}

}  // namespace emu

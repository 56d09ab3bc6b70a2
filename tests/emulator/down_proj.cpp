#include "cuda/down_proj_plan.cpp"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::vector<Launch> down_proj_launches(const DownProjArgs& args, const DownProjPlan& plan) {
  if (plan.kernel == DownProjKernel::none) return {};
  const bool sm90 = plan.kernel == DownProjKernel::sm90;
  Launch l;
  l.name = sm90 ? "down_proj_sm90" : "down_proj_sm80";
  l.body = sm90 ? down_proj_sm90_body(args, plan) : down_proj_sm80_body(args, plan);
  if (!l.body) throw Error(l.name + ": no kernel was built for this plan");
  l.grid_x = static_cast<unsigned>(plan.blocks);
  l.grid_y = static_cast<unsigned>(plan.rank_blocks);
  l.threads = static_cast<unsigned>(plan.threads);
  l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
  return {l};
}

}  // namespace emu

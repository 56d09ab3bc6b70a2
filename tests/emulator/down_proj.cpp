#include "cuda/down_proj_plan.cpp"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

namespace {

Launch launch_of(const char* name, std::function<void()> body, const DownProjPlan& plan) {
  Launch l;
  l.name = name;
  l.body = std::move(body);
  if (!l.body) throw Error(l.name + ": no kernel was built for this plan");
  l.threads = static_cast<unsigned>(plan.threads);
  l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
  return l;
}

}  // namespace

std::vector<Launch> down_proj_group_launches(const DownProjArgs* each, int count,
                                             const DownProjGroupPlan& plan) {
  if (!plan.served) throw Error(plan.reason);
  if (plan.tile.kernel == Kernel::none) return {};
  Launch l = launch_of("down_proj_sm90", down_proj_sm90_body(each, count, plan), plan.tile);
  l.grid_x = static_cast<unsigned>(plan.tile.blocks * plan.tile.rank_blocks);
  return {l};
}

std::vector<Launch> down_proj_launches(const DownProjArgs& args, const DownProjPlan& plan) {
  if (plan.kernel == Kernel::none) return {};
  if (plan.kernel == Kernel::sm90) return down_proj_group_launches(&args, 1, group_of_one(plan));
  Launch l = launch_of("down_proj_sm80", down_proj_sm80_body(args, plan), plan);
  l.grid_x = static_cast<unsigned>(plan.blocks * plan.rank_blocks);
  return {l};
}

}  // namespace emu

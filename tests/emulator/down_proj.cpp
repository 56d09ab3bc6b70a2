#include "cuda/down_proj.cpp"

#include "cuda/down_proj_plan.cpp"
#include "recorder.h"

namespace emu {

using namespace lora_kernels;

std::vector<Launch> down_proj_launches(const DownProjArgs& args, const DownProjPlan& plan) {
  std::vector<Launch> launches;
  Recording to(launches);
  to.done(launch_down_proj(args, plan, to.stream()));
  return launches;
}

std::vector<Launch> down_proj_group_launches(const DownProjArgs* each, int count,
                                             const DownProjGroupPlan& plan) {
  std::vector<Launch> launches;
  Recording to(launches);
  to.done(launch_down_proj_group(each, count, plan, to.stream()));
  return launches;
}

}  // namespace emu

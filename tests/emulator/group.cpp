#include "cuda/group.cpp"

#include "cuda/backward_group_plan.cpp"
#include "cuda/forward_group_plan.cpp"
#include "recorder.h"

namespace emu {

using namespace lora_kernels;

void add_forward_group(const ForwardArgs* args, int count, const ForwardGroupPlan& plan,
                       const Target& target, void* workspace, std::vector<Launch>& launches,
                       int fails) {
  Recording to(launches, fails);
  to.done(launch_forward_group(args, count, plan, workspace, target, to.stream()));
}

void add_backward_group(const BackwardArgs* args, int count, const BackwardGroupPlan& plan,
                        const Target& target, void* workspace, std::vector<Launch>& launches,
                        int fails) {
  Recording to(launches, fails);
  to.done(launch_backward_group(args, count, plan, workspace, target, to.stream()));
}

}  // namespace emu

#include "recorder.h"

#include "cuda/backward_group_plan.cpp"
#include "cuda/forward_group_plan.cpp"

namespace emu {

void add_forward_group(const ForwardArgs* args, int count, const ForwardGroupPlan& plan,
                       const Target& target, void* workspace, std::vector<Launch>& launches,
                       int fails) {
  Recorder recorder{target, launches, fails};
  run_forward_group(args, count, plan, workspace, recorder);
}

void add_backward_group(const BackwardArgs* args, int count, const BackwardGroupPlan& plan,
                        const Target& target, void* workspace, std::vector<Launch>& launches,
                        int fails) {
  Recorder recorder{target, launches, fails};
  run_backward_group(args, count, plan, workspace, recorder);
}

}  // namespace emu

#include "cuda/backward.cpp"

#include "cuda/backward_plan.cpp"
#include "cuda/weight_grad_plan.cpp"
#include "recorder.h"

namespace emu {

using namespace lora_kernels;

void add_backward(const BackwardArgs& args, const BackwardPlan& plan, const Target& target,
                  void* workspace, std::vector<Launch>& launches, int fails) {
  Recording to(launches, fails);
  to.done(launch_backward(args, plan, workspace, target, to.stream()));
}

void add_weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan, const Target& target,
                     void* workspace, std::vector<Launch>& launches) {
  Recording to(launches);
  to.done(launch_weight_grad(pass, plan, workspace, target, to.stream()));
}

}  // namespace emu

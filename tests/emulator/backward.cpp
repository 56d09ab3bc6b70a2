#include "cuda/backward_plan.cpp"
#include "cuda/weight_grad_plan.cpp"
#include "recorder.h"

namespace emu {

void add_backward(const BackwardArgs& args, const BackwardPlan& plan, const Target& target,
                  void* workspace, std::vector<Launch>& launches, int fails) {
  Recorder recorder{target, launches, fails};
  run_backward(args, plan, workspace, recorder);
}

void add_weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan, const Target& target,
                     void* workspace, std::vector<Launch>& launches) {
  Recorder recorder{target, launches};
  run_weight_grad(pass, plan, workspace, recorder);
}

}  // namespace emu

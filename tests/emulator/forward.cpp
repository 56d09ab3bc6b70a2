#include "cuda/forward_plan.cpp"
#include "cuda/fused_gemm_plan.cpp"
#include "recorder.h"

namespace emu {

void add_forward(const ForwardArgs& args, const ForwardPlan& plan, const Target& target,
                 void* workspace, std::vector<Launch>& launches, int fails) {
  Recorder recorder{target, launches, fails};
  run_forward(args, plan, workspace, recorder);
}

void add_fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, const Target& target,
                    void* workspace, std::vector<Launch>& launches) {
  Recorder recorder{target, launches};
  run_fused_gemm(args, plan, workspace, recorder);
}

}  // namespace emu

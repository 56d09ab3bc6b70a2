#include "cuda/forward.cpp"

#include "cuda/forward_plan.cpp"
#include "cuda/fused_gemm_plan.cpp"
#include "recorder.h"

namespace emu {

using namespace lora_kernels;

void add_forward(const ForwardArgs& args, const ForwardPlan& plan, const Target& target,
                 void* workspace, std::vector<Launch>& launches, int fails) {
  Recording to(launches, fails);
  to.done(launch_forward(args, plan, workspace, target, to.stream()));
}

void add_fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, const Target& target,
                    void* workspace, std::vector<Launch>& launches) {
  Recording to(launches);
  to.done(launch_fused_gemm(args, plan, workspace, target, to.stream()));
}

}  // namespace emu

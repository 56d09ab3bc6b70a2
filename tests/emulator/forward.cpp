#include "cuda/forward_plan.cpp"
#include "cuda/fused_gemm_plan.cpp"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

namespace {

// run_forward's launches, one after another.
struct Recorder {
  const Target& target;
  std::vector<Launch>& launches;
  int fails = -1;  // which of the launches reports a failure
  int last = -1;   // index of the launch before, in this stream

  int add(Launch l, bool programmatic = false) {
    if (!l.body) throw Error(l.name + ": no kernel was built for this plan");
    l.after = last;
    l.programmatic = programmatic;
    last = static_cast<int>(launches.size());
    launches.push_back(std::move(l));
    return static_cast<int>(launches.size()) - 1 == fails;
  }
  int pack(const PackJobs& jobs) {
    Launch l;
    l.name = "pack";
    l.body = pack_body(jobs);
    l.grid_x = pack_blocks(jobs, target.multiprocessors);
    l.grid_y = static_cast<unsigned>(jobs.count);
    l.threads = kPackThreads;
    return add(std::move(l));
  }
  int zero(uint32_t* words, uint32_t count) {
    Launch l;
    l.name = "zero";
    l.body = zero_body(words, count);
    l.grid_x = zero_blocks(count);
    l.threads = kPackThreads;
    return add(std::move(l));
  }
  int down_proj(const DownProjArgs& args, const DownProjPlan& plan) {
    int error = 0;
    for (Launch& l : down_proj_launches(args, plan)) error = add(std::move(l));
    return error;
  }
  Launch clusters(const char* name, const FusedGemmPlan& plan, unsigned count) {
    Launch l;
    l.name = name;
    l.cluster = 2;
    l.grid_x = 2 * count;
    l.threads = static_cast<unsigned>(plan.threads);
    l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
    return l;
  }
  int fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                 bool early) {
    Launch l = clusters("fused_gemm_sm90", plan, plan.clusters);
    l.body = fused_gemm_body(args, plan, workspace);
    return add(std::move(l), early);
  }
  int forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace) {
    Launch l = clusters("forward_sm90", plan.gemm, plan.clusters);
    l.body = forward_body(args, plan, workspace);
    return add(std::move(l), true);
  }
};

}  // namespace

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

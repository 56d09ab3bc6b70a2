// What plans launch, as launches of the emulator.
#pragma once
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

// The launches of run_forward and its like, one after another.
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
  int down_proj_group(const DownProjArgs* each, int count, const DownProjGroupPlan& plan) {
    int error = 0;
    for (Launch& l : down_proj_group_launches(each, count, plan)) error = add(std::move(l));
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
  int fused_gemm(const FusedGemmGroup& group, void* workspace, bool early) {
    const FusedGemmPlan& plan = group.plans[0];
    if (plan.kernel == Kernel::sm80) return fused_gemm_sm80(group, workspace);
    Launch l = clusters("fused_gemm_sm90", plan, group.clusters);
    l.body = fused_gemm_body(group, workspace);
    return add(std::move(l), early);
  }
  int fused_gemm_sm80(const FusedGemmGroup& group, void* workspace) {
    Launch l;
    l.name = "fused_gemm_sm80";
    l.body = fused_gemm_sm80_body(group, workspace);
    l.grid_x = group.raster.items();
    l.threads = static_cast<unsigned>(group.plans[0].threads);
    l.shared_bytes = static_cast<uint32_t>(group.plans[0].shared_bytes);
    return add(std::move(l));
  }
  int forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace) {
    Launch l = clusters("forward_sm90", plan.gemm, plan.clusters);
    l.body = forward_body(args, plan, workspace);
    return add(std::move(l), true);
  }
  int decode(const ForwardArgs& args, const DecodePlan& plan) {
    Launch l;
    l.name = "decode";
    l.body = decode_body(args, plan);
    l.cluster = static_cast<unsigned>(plan.work.splits);
    l.grid_x = static_cast<unsigned>(plan.tiles) * l.cluster;
    l.threads = static_cast<unsigned>(plan.threads);
    l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
    return add(std::move(l));
  }
  int backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace) {
    Launch l = clusters("backward_sm90", plan.gemm, plan.grid.clusters);
    l.body = backward_body(args, plan, workspace);
    return add(std::move(l), true);
  }
  int weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
    const bool sm90 = plan.kernel == Kernel::sm90;
    Launch l;
    l.name = sm90 ? "weight_grad_sm90" : "weight_grad_sm80";
    l.body = (sm90 ? weight_grad_body : weight_grad_sm80_body)(pass, plan, workspace);
    l.grid_x = static_cast<unsigned>(plan.chunks);
    l.grid_y = static_cast<unsigned>(plan.splits * plan.rank_blocks);
    if (!sm90) std::swap(l.grid_x, l.grid_y);
    l.threads = static_cast<unsigned>(plan.threads);
    l.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
    return add(std::move(l));
  }
  int reduce(const ReduceJobs& jobs) {
    Launch l;
    l.name = "reduce";
    l.body = reduce_body(jobs);
    l.grid_x = reduce_blocks(jobs, target.multiprocessors);
    l.grid_y = static_cast<unsigned>(jobs.count);
    l.threads = kReduceThreads;
    return add(std::move(l));
  }
};

}  // namespace emu

// Which launches make up the forward pass of projections that share x: host code alone, so tests
// need no GPU.
//
//   h of all   by one read of x                                       (down_proj_sm90.cuh)
//   y of all   by one grid, in which their tiles stand side by side   (fused_gemm_sm90.cuh)
//
// An h that another kernel makes when the projection is alone is made by that one here too, since y
// has the bits of a call alone; so is all of a projection of few rows that decode serves, whose
// time is that of its own W. Around them, only where needed, the copies of run_forward.
#pragma once
#include "forward_plan.h"

namespace lora_kernels {

struct ForwardGroupPlan {
  bool served;
  const char* reason;  // why not

  // h: of projections `joined`, in one launch; of the others by a launch each.
  int joined[kMaxGroup], joined_count;
  DownProjGroupPlan down;
  DownProjPlan alone[kMaxGroup];
  TmaOperand x, lora_a[kMaxGroup];
  bool h_padded[kMaxGroup];  // made in the workspace, in wider rows, and copied out
  int64_t h_offset[kMaxGroup];

  // y: of projections `outputs`, those that are not empty and not decoded.
  int outputs[kMaxGroup], output_count;
  FusedGemmGroup gemm;
  bool decoded[kMaxGroup];  // by a launch each
  DecodePlan decode[kMaxGroup];
  int64_t workspace_bytes;
};

// `count` projections, from 1 to kMaxGroup, whose x is the same.
ForwardGroupPlan plan_forward_group(const ForwardArgs* args, int count, const Target& target);
std::string describe(const ForwardGroupPlan& plan, int count);

// The down projections of a plan as they are launched.
inline DownProjArgs down_args_of(const ForwardArgs& args, const ForwardGroupPlan& plan, int i,
                                 void* workspace) {
  DownProjArgs down = args.down;
  if (plan.x.packed) down.x = plan.x.at(workspace);
  if (plan.h_padded[i])
    down.h = {static_cast<uint8_t*>(workspace) + plan.h_offset[i], ceil_div(down.r, 8) * 8, 1,
              down.h.dtype};
  return down;
}

// Those of one launch; where only some have a mask, the others keep all that they draw.
inline void joined_args_of(const ForwardArgs* args, const ForwardGroupPlan& plan, void* workspace,
                           DownProjArgs* joined) {
  Dropout keeps{nullptr, 0, 0};
  for (int i = 0; i < plan.joined_count; ++i) {
    const int p = plan.joined[i];
    joined[i] = down_args_of(args[p], plan, p, workspace);
    joined[i].down = plan.lora_a[p].at(workspace);
    if (joined[i].dropout.seed != nullptr)
      keeps = {joined[i].dropout.seed, joined[i].dropout.seed_len, 0};
  }
  for (int i = 0; i < plan.joined_count; ++i)
    if (joined[i].dropout.seed == nullptr) joined[i].dropout = keeps;
}

// Makes the launches of a plan, in order, through `launcher` (see run_forward), until one does not
// return 0.
//
//   launcher.down_proj_group(args, count, plan)
template <class Launcher>
int run_forward_group(const ForwardArgs* args, int count, const ForwardGroupPlan& plan,
                      void* workspace, Launcher& launcher) {
  PackJobs before, after;
  before.add(plan.x, workspace);
  DownProjArgs each[kMaxGroup], joined[kMaxGroup];
  // Whether a launch that waits for all before it makes an h: only behind one may fused_gemm start
  // early. What decode serves makes its own h, afterwards.
  bool adapted = plan.joined_count > 0;
  for (int i = 0; i < count; ++i) {
    each[i] = down_args_of(args[i], plan, i, workspace);
    adapted |= plan.alone[i].kernel != Kernel::none;
    if (plan.h_padded[i])
      after.jobs[after.count++] = {each[i].h,           each[i].M, each[i].r,
                                   args[i].down.h.data, each[i].M, each[i].r};
  }
  joined_args_of(args, plan, workspace, joined);
  for (int i = 0; i < plan.joined_count; ++i) before.add(plan.lora_a[plan.joined[i]], workspace);

  FusedGemmGroup gemm = plan.gemm;
  for (int i = 0; i < plan.output_count; ++i) {
    gemm.plans[i].h.from = gemm.args[i].h = each[plan.outputs[i]].h;
    for (const TmaOperand* o : {&gemm.plans[i].weight, &gemm.plans[i].up, &gemm.plans[i].bias})
      before.add(*o, workspace);
  }

  int error = before.count > 0 ? launcher.pack(before) : 0;
  for (int i = 0; i < count; ++i)
    if (error == 0 && plan.alone[i].kernel != Kernel::none)
      error = launcher.down_proj(each[i], plan.alone[i]);
  if (error == 0 && plan.joined_count > 0)
    error = launcher.down_proj_group(joined, plan.joined_count, plan.down);
  if (error == 0 && plan.output_count > 0) error = launcher.fused_gemm(gemm, workspace, adapted);
  if (error == 0 && after.count > 0) error = launcher.pack(after);
  for (int i = 0; i < count; ++i)
    if (error == 0 && plan.decoded[i] && !plan.decode[i].empty)
      error = launcher.decode(args[i], plan.decode[i]);
  return error;
}

}  // namespace lora_kernels

// Which launches make up the backward pass of projections that share x: host code alone, so tests
// need no GPU.
//
//   dy passes   dh, dB, dbias of each projection, from its own dy    (weight_grad_sm90.cuh)
//   dx          one sum over all projections, rounded once           (fused_gemm_sm90.cuh)
//   x passes    dA of all, by as few reads of x as pay               (weight_grad_sm90.cuh)
//
// The dh of all projections lie side by side, so that to an x pass they are one matrix. Partial
// results are added by reduce.cuh, those of dh before dx.
#pragma once
#include "backward_plan.h"

namespace lora_kernels {

// A read of x, for projections [first, last).
struct XPass {
  int first, last;
  WeightGradPlan plan;
};

struct BackwardGroupPlan {
  bool served;
  const char* reason;  // why not

  bool reads_dy[kMaxGroup];
  WeightGradPlan dy_pass[kMaxGroup];
  XPass x_passes[kMaxGroup];
  int x_pass_count;
  TmaOperand dy[kMaxGroup];
  DownProjPlan down[kMaxGroup];  // of a dh that its dy pass does not make
  bool has_dx;
  FusedGemmGroup gemm;

  int64_t first[kMaxGroup], width;  // columns of dh
  bool has_gaps;                    // between them
  int64_t dh_offset, workspace_bytes;

  Matrix dh(void* workspace, int i, Dtype dtype) const {
    return {static_cast<uint8_t*>(workspace) + dh_offset + first[i] * 2, width, 1, dtype};
  }
};

// `count` projections, from 1 to kMaxGroup, of which x, dx, need_x, M and K are the same.
BackwardGroupPlan plan_backward_group(const BackwardArgs* args, int count, const Target& target);
std::string describe(const BackwardGroupPlan& plan, int count);

WeightGradPass x_pass_of(const BackwardArgs* args, const BackwardGroupPlan& plan, int first,
                         int last, void* workspace);
// All copies ahead of the passes; each operand once.
PackJobs pack_jobs(const BackwardGroupPlan& plan, int count, void* workspace);

// Makes the launches of a plan, in order, through `launcher` (see run_backward), until one does not
// return 0.
template <class Launcher>
int run_backward_group(const BackwardArgs* args, int count, const BackwardGroupPlan& plan,
                       void* workspace, Launcher& launcher) {
  const Dtype dtype = args->x.dtype;
  const PackJobs before = pack_jobs(plan, count, workspace);
  ReduceJobs first, last;
  int error = before.count > 0 ? launcher.pack(before) : 0;
  if (error == 0 && plan.has_gaps)
    error = launcher.zero(static_cast<uint32_t*>(plan.dh(workspace, 0, dtype).data),
                          static_cast<uint32_t>(args->M * plan.width / 2));
  for (int i = 0; i < count; ++i) {
    const WeightGradPass pass = dy_pass_of(args[i], plan.dh(workspace, i, dtype));
    const WeightGradPlan& dy = plan.dy_pass[i];
    if (error == 0 && plan.reads_dy[i] && !dy.empty)
      error = launcher.weight_grad(pass, dy, workspace);
    if (dy.makes_down) first.add(down_job(pass, dy, workspace));
    if (pass.with_grad) last.add(grad_job(pass, dy, workspace));
    if (pass.with_sums) last.add(sums_job(pass, dy, workspace));
  }
  if (error == 0 && first.count > 0) error = launcher.reduce(first);
  for (int i = 0; i < count; ++i)
    if (error == 0 && plan.down[i].kernel != Kernel::none)
      error = launcher.down_proj(
          dh_args_of(args[i], plan.dy[i].at(workspace), plan.dh(workspace, i, dtype)),
          plan.down[i]);
  if (error == 0 && plan.has_dx) {
    FusedGemmGroup gemm = plan.gemm;
    for (int i = 0; i < count; ++i)
      gemm.plans[i].h.from = gemm.args[i].h = plan.dh(workspace, i, dtype);
    error = launcher.fused_gemm(gemm, workspace, plan.width > 0);
  }
  for (int i = 0; i < plan.x_pass_count; ++i) {
    const XPass& of = plan.x_passes[i];
    const WeightGradPass pass = x_pass_of(args, plan, of.first, of.last, workspace);
    WeightGradPlan x = of.plan;
    x.h.from = pass.grad.h;
    if (error == 0 && !x.empty) error = launcher.weight_grad(pass, x, workspace);
    add_grad_jobs(pass, x, workspace, last);
  }
  if (error == 0 && last.count > 0) error = launcher.reduce(last);
  return error;
}

}  // namespace lora_kernels

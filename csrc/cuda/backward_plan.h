// Which launches make up a backward call: host code alone, so tests need no GPU.
//
//   passes    three kernels, each a baseline to read and to compare with
//   one grid  all of it in dx's grid (backward_sm90.cuh), for all three gradients at r <= 64
//
// The passes:
//
//   dy pass   dh = h_scale dy B, dB = up_scale dy^T h, dbias: one read of dy (weight_grad_sm90.cuh)
//   dx        dy W0 + select(mask, masked_scale dh A, 0)                     (fused_gemm_sm90.cuh)
//   x pass    dA = masked_scale dh^T select(mask, x, 0): one read of x       (weight_grad_sm90.cuh)
//
// Each only if a gradient asks for it, and dh by down_proj where dB is not wanted. Partial results
// are added by reduce.cuh: those of dh before dx, the others at the end. Around them, only where
// needed, copies of operands that TMA cannot address.
#pragma once
#include <string>

#include "backward_order.h"
#include "forward_plan.h"
#include "weight_grad_plan.h"

namespace lora_kernels {

struct BackwardArgs {
  Matrix dy, x, weight;      // [M, N], [M, K], [N, K]
  Matrix lora_a, lora_b, h;  // [r, K], [N, r], [M, r]
  Matrix dx, da, db, dbias;  // [M, K], [r, K], [N, r], [1, N]
  bool need_x, need_a, need_b, need_bias;
  int64_t M, N, K, r;
  float h_scale, up_scale;
  float masked_scale;  // up_scale / q
  Dropout dropout;

  bool needs_dh() const { return r > 0 && (need_x || need_a); }
};

// Which tiles of dx have a kernel that does it all.
constexpr bool has_backward_tile(int tile_n) { return tile_n == 256 || tile_n == 128; }

// What each launch is told; `dh` [M, r].
WeightGradPass dy_pass_of(const BackwardArgs& args, const Matrix& dh);
WeightGradPass x_pass_of(const BackwardArgs& args, const Matrix& dh);
FusedGemmArgs dx_args_of(const BackwardArgs& args, const Matrix& dh);
DownProjArgs dh_args_of(const BackwardArgs& args, const Matrix& dy, const Matrix& dh);

enum class BackwardForm { any, one_grid, passes };
// By name, "" for any; false if there is none such.
inline bool form_of(const std::string& name, BackwardForm* form) {
  *form = name == "one_grid" ? BackwardForm::one_grid
          : name.empty()     ? BackwardForm::any
                             : BackwardForm::passes;
  return name.empty() || name == "one_grid" || name == "passes";
}

struct BackwardRequest {
  BackwardForm form = BackwardForm::any;
  FusedGemmRequest gemm;
};

// Of the tiles of h, dh and B in one grid. Those of 16 need copies of h, dh and B with their ranks
// as rows: only so is it known that wgmma takes 16 columns.
constexpr int kGridRanks[] = {16, 64};

// Of one grid; partial results lie where those of the passes would.
struct OneGridPlan {
  BackwardOrder order;
  int rank;  // one of kGridRanks
  unsigned clusters;
  uint32_t blocks_of_slice;  // of 64 columns of x
  uint32_t rows_of_sum;
  int64_t sync_offset;  // ticket, flags and counts, which the launch ahead zeroes

  int64_t flags() const { return 2 * int64_t{BackwardOrder::kChunkPairs} * order.chunks(); }
  int64_t sync_words() const { return 2 + flags() + order.slices; }
  bool turned() const { return rank == kGridRanks[0]; }
};

struct BackwardPlan {
  bool served;
  const char* reason;      // why not, or why in this form
  BackwardForm form;       // never `any` if served
  bool reads_dy, reads_x;  // whether there is such a pass
  WeightGradPlan dy_pass, x_pass;
  TmaOperand dy;       // as the dy pass and dx find it
  DownProjPlan down;   // of dh, if the dy pass does not make it
  FusedGemmPlan gemm;  // of dx
  OneGridPlan grid;
  int64_t workspace_bytes;
  int64_t dh_offset, dh_width;
  int64_t turned_offset;  // of dh with its ranks as rows
  double overhead;        // over the frozen GEMM of dx, by the model: 0.01 is 1 %; 0 without dx

  Matrix dh(void* workspace, Dtype dtype) const {
    return {static_cast<uint8_t*>(workspace) + dh_offset, dh_width, 1, dtype};
  }
  Matrix turned_dh(const BackwardArgs& args, void* workspace) const {
    return {static_cast<uint8_t*>(workspace) + turned_offset, ceil_div(args.M, 8) * 8, 1,
            args.dy.dtype};
  }
};

BackwardPlan plan_backward(const BackwardArgs& args, const Target& target,
                           const BackwardRequest& request = {});
std::string describe(const BackwardPlan& plan);

// All copies ahead of the passes; each operand once.
PackJobs pack_jobs(const BackwardPlan& plan, void* workspace);

// Makes the launches of one weight_grad pass, as run_backward does.
//
//   launcher.weight_grad(pass, plan, workspace)
//   launcher.reduce(jobs)
template <class Launcher>
int run_weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                    Launcher& launcher) {
  PackJobs before;
  ReduceJobs after;
  if (!plan.empty)
    for (const TmaOperand* o : {&plan.x, &plan.h}) before.add(*o, workspace);
  add_grad_jobs(pass, plan, workspace, after);
  if (pass.with_sums) after.add(sums_job(pass, plan, workspace));
  int error = before.count > 0 ? launcher.pack(before) : 0;
  if (error == 0 && !plan.empty) error = launcher.weight_grad(pass, plan, workspace);
  if (error == 0 && after.count > 0) error = launcher.reduce(after);
  return error;
}

// Makes the launches of a plan, in order, through `launcher` (see run_forward and run_weight_grad),
// until one does not return 0.
//
//   launcher.backward(args, plan, workspace)   all in one; starts early, and waits before it takes
//                                              a ticket
template <class Launcher>
int run_one_grid(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                 Launcher& launcher) {
  const PackJobs before = pack_jobs(plan, workspace);
  auto* sync = static_cast<uint8_t*>(workspace) + plan.grid.sync_offset;
  int error = before.count > 0 ? launcher.pack(before) : 0;
  if (error == 0)
    error = launcher.zero(reinterpret_cast<uint32_t*>(sync),
                          static_cast<uint32_t>(plan.grid.sync_words()));
  return error == 0 ? launcher.backward(args, plan, workspace) : error;
}

template <class Launcher>
int run_passes(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
               Launcher& launcher) {
  const Matrix dh = plan.dh(workspace, args.dy.dtype);
  const WeightGradPass dy_pass = dy_pass_of(args, dh), x_pass = x_pass_of(args, dh);
  const PackJobs before = pack_jobs(plan, workspace);
  int error = before.count > 0 ? launcher.pack(before) : 0;
  ReduceJobs first, last;
  if (plan.reads_dy) {
    if (error == 0 && !plan.dy_pass.empty)
      error = launcher.weight_grad(dy_pass, plan.dy_pass, workspace);
    if (plan.dy_pass.makes_down) first.add(down_job(dy_pass, plan.dy_pass, workspace));
    if (dy_pass.with_grad) last.add(grad_job(dy_pass, plan.dy_pass, workspace));
    if (dy_pass.with_sums) last.add(sums_job(dy_pass, plan.dy_pass, workspace));
  }
  if (error == 0 && first.count > 0) error = launcher.reduce(first);
  if (error == 0 && args.needs_dh() && !plan.dy_pass.makes_down)
    error = launcher.down_proj(dh_args_of(args, plan.dy.at(workspace), dh), plan.down);
  if (error == 0 && args.need_x && !plan.gemm.empty) {
    FusedGemmPlan gemm = plan.gemm;
    gemm.h.from = dh;
    error = launcher.fused_gemm(group_of(dx_args_of(args, dh), gemm), workspace, args.needs_dh());
  }
  if (plan.reads_x) {
    WeightGradPlan x = plan.x_pass;
    x.h.from = dh;
    if (error == 0 && !x.empty) error = launcher.weight_grad(x_pass, x, workspace);
    last.add(grad_job(x_pass, x, workspace));
  }
  if (error == 0 && last.count > 0) error = launcher.reduce(last);
  return error;
}

template <class Launcher>
int run_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                 Launcher& launcher) {
  return plan.form == BackwardForm::one_grid ? run_one_grid(args, plan, workspace, launcher)
                                             : run_passes(args, plan, workspace, launcher);
}

}  // namespace lora_kernels

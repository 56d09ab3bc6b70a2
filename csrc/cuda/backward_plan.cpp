#include "backward_plan.h"

#include <algorithm>
#include <cstdio>

#include "model.h"

namespace lora_kernels {

WeightGradPass dy_pass_of(const BackwardArgs& a, const Matrix& dh) {
  WeightGradPass pass{};
  pass.with_grad = a.need_b && a.r > 0;
  pass.with_down = pass.with_grad && a.needs_dh();
  pass.with_sums = a.need_bias;
  pass.grad = {a.h, a.dy, transposed(a.db), a.M, a.N, a.r, a.up_scale, {}};
  pass.down = dh_args_of(a, a.dy, dh);
  pass.sums = a.dbias;
  return pass;
}

WeightGradPass x_pass_of(const BackwardArgs& a, const Matrix& dh) {
  WeightGradPass pass{};
  pass.with_grad = a.need_a && a.r > 0;
  pass.grad = {dh, a.x, a.da, a.M, a.K, a.r, a.masked_scale, a.dropout};
  return pass;
}

FusedGemmArgs dx_args_of(const BackwardArgs& a, const Matrix& dh) {
  const Matrix no_bias{nullptr, 0, 0, a.dy.dtype};
  const float scale = a.dropout.seed != nullptr ? a.masked_scale : a.up_scale;
  return {a.dy, transposed(a.weight), dh,  transposed(a.lora_a), no_bias, a.dx, a.M, a.K, a.N, a.r,
          scale, a.dropout};
}

DownProjArgs dh_args_of(const BackwardArgs& a, const Matrix& dy, const Matrix& dh) {
  return {dy, transposed(a.lora_b), dh, a.M, a.N, a.r, a.h_scale, {}};
}

namespace {

// Clocks of the mask and of the products by mma.sync of one tile, which no load hides.
double masked_cycles(const FusedGemmPlan& gemm) {
  constexpr double kFragmentClocks = 120, kStepClocks = 16;  // of 16 columns; of each k16 step
  if (!gemm.masked) return 0;
  const auto steps = static_cast<double>(ceil_div(gemm.r, kMmaDepth));
  return gemm.tile_n / 16.0 * (kFragmentClocks + steps * kStepClocks);
}

double overhead_of(const BackwardArgs& a, const BackwardPlan& plan) {
  const FusedGemmPlan& gemm = plan.gemm;
  if (!a.need_x || gemm.empty) return 0;
  const auto waves = static_cast<double>(ceil_div(gemm.raster.items(), gemm.clusters));
  const int64_t steps = ceil_div(a.N, kMmaDepth), ranks = ceil_div(gemm.r, kMmaDepth);
  const double tile = gemm.masked ? masked_cycles(gemm)
                                  : tile_cycles(gemm.tile_n, steps + ranks) -
                                        tile_cycles(gemm.tile_n, steps);
  double cycles = waves * tile + plan.dy_pass.cycles + plan.x_pass.cycles;
  if (plan.down.kernel != DownProjKernel::none)
    cycles += memory_clocks(static_cast<double>(a.M * a.N) * 2);
  const int launches = 2 * plan.reads_dy + 2 * plan.reads_x +
                       (plan.down.kernel != DownProjKernel::none);
  return (cycles + launches * kLaunchSeconds * kClock) / gemm_cycles(gemm, a.N);
}

const char* not_served(const BackwardArgs& a, const BackwardPlan& plan, const Target& target) {
  if (const char* reason = no_sm90a(target)) return reason;
  if (a.need_x && !plan.gemm.served) return plan.gemm.reason;
  if (plan.reads_dy && !plan.dy_pass.served) return plan.dy_pass.reason;
  if (plan.reads_x && !plan.x_pass.served) return plan.x_pass.reason;
  return nullptr;
}

void place_operands(const BackwardArgs& a, BackwardPlan& plan) {
  int64_t end = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = end;
    end += ceil_div(bytes, 128) * 128;
    return offset;
  };
  if (a.needs_dh()) plan.dh_offset = reserve(a.M * plan.dh_width * 2);
  const bool has_dx = a.need_x && !plan.gemm.empty;
  if (has_dx || (plan.reads_dy && !plan.dy_pass.empty)) {
    plan.dy = tma_operand(a.dy, a.M, a.N);
    plan.dy.offset = reserve(plan.dy.bytes());
  } else {
    plan.dy.from = a.dy;  // down_proj takes it as it lies
  }
  plan.gemm.h.packed = plan.x_pass.h.packed = false;  // dh is made here, as TMA needs it
  plan.gemm.x = plan.dy_pass.x = plan.dy;
  for (TmaOperand* o :
       {&plan.gemm.weight, &plan.gemm.up, &plan.dy_pass.h, &plan.dy_pass.down, &plan.x_pass.x})
    o->offset = reserve(o->bytes());
  if (plan.reads_dy) end = place_partials(dy_pass_of(a, {}), plan.dy_pass, end);
  if (plan.reads_x) end = place_partials(x_pass_of(a, {}), plan.x_pass, end);
  plan.workspace_bytes = end;
}

}  // namespace

BackwardPlan plan_backward(const BackwardArgs& args, const Target& target,
                           const FusedGemmRequest& request) {
  BackwardPlan plan{};
  plan.dh_width = std::max<int64_t>(8, ceil_div(args.r, 8) * 8);
  const Matrix dh{nullptr, plan.dh_width, 1, args.dy.dtype};
  const WeightGradPass dy_pass = dy_pass_of(args, dh), x_pass = x_pass_of(args, dh);
  plan.reads_dy = dy_pass.with_grad || dy_pass.with_sums;
  plan.reads_x = x_pass.with_grad;
  if (plan.reads_dy) plan.dy_pass = plan_weight_grad(dy_pass, target);
  if (plan.reads_x) plan.x_pass = plan_weight_grad(x_pass, target);
  if (args.need_x) plan.gemm = plan_fused_gemm(dx_args_of(args, dh), target, request);
  plan.reason = not_served(args, plan, target);
  plan.served = plan.reason == nullptr;
  if (!plan.served) return plan;
  plan.reason = "TMA and wgmma";
  place_operands(args, plan);
  if (args.needs_dh() && !dy_pass.with_down)
    plan.down = plan_down_proj(dh_args_of(args, plan.dy.at(nullptr), dh), target);
  plan.overhead = overhead_of(args, plan);
  return plan;
}

PackJobs pack_jobs(const BackwardPlan& plan, void* workspace) {
  PackJobs jobs;
  for (const TmaOperand* o : {&plan.dy, &plan.gemm.weight, &plan.gemm.up, &plan.dy_pass.h,
                              &plan.dy_pass.down, &plan.x_pass.x})
    jobs.add(*o, workspace);
  return jobs;
}

std::string describe(const BackwardPlan& plan) {
  if (!plan.served) return plan.reason;
  std::string text;
  const auto add = [&](bool wanted, const char* name, const auto& part) {
    if (wanted) text += (text.empty() ? "" : "; ") + std::string(name) + describe(part);
  };
  add(plan.reads_dy, "dy pass ", plan.dy_pass);
  add(plan.down.kernel != DownProjKernel::none, "dh ", plan.down);
  add(plan.gemm.served, "dx ", plan.gemm);
  add(plan.reads_x, "x pass ", plan.x_pass);
  if (plan.overhead == 0) return text.empty() ? "no gradient is needed" : text;
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.1f %%", 100 * plan.overhead);
  return text + "; " + percent + " over the frozen GEMM of dx by the model";
}

}  // namespace lora_kernels

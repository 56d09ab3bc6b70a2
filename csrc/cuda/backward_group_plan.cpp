#include "backward_group_plan.h"

namespace lora_kernels {
namespace {

int64_t padded(int64_t r) { return ceil_div(r, 8) * 8; }

}  // namespace

WeightGradPass x_pass_of(const BackwardArgs* args, const BackwardGroupPlan& plan, int first,
                         int last, void* workspace) {
  WeightGradPass pass{};
  const Matrix dh = plan.dh(workspace, first, args->x.dtype);
  int64_t r = 0;
  for (int i = first; i < last; ++i) {
    const BackwardArgs& a = args[i];
    if (!a.need_a || a.r == 0) continue;
    pass.with_grad = true;
    const int64_t column = plan.first[i] - plan.first[first];
    pass.parts[pass.part_count++] = {column, a.r, a.da, a.masked_scale, a.dropout};
    r = column + padded(a.r);
  }
  pass.grad = {dh, args->x, {}, args->M, args->K, r, 1.0f, {}};
  return pass;
}

PackJobs pack_jobs(const BackwardGroupPlan& plan, int count, void* workspace) {
  PackJobs jobs;
  for (int i = 0; i < count; ++i) {
    for (const TmaOperand* o : {&plan.dy[i], &plan.dy_pass[i].h, &plan.dy_pass[i].down})
      jobs.add(*o, workspace);
    if (!plan.has_dx) continue;
    for (const TmaOperand* o : {&plan.gemm.plans[i].weight, &plan.gemm.plans[i].up})
      jobs.add(*o, workspace);
  }
  if (plan.x_pass_count > 0) jobs.add(plan.x_passes[0].plan.x, workspace);
  return jobs;
}

namespace {

// dh of all projections side by side, each from a 16-byte boundary on.
void lay_out_dh(const BackwardArgs* args, int count, BackwardGroupPlan& plan) {
  for (int i = 0; i < count; ++i) {
    plan.first[i] = plan.width;
    if (!args[i].needs_dh()) continue;
    plan.width += padded(args[i].r);
    plan.has_gaps |= args[i].r % 8 != 0;
  }
}

// nullptr, or why the kernels do not serve the dy pass of a projection.
const char* plan_dy(const BackwardArgs& a, const Target& target, int i, BackwardGroupPlan& plan) {
  const Matrix dh = plan.dh(nullptr, i, a.x.dtype);
  const WeightGradPass pass = dy_pass_of(a, dh);
  plan.reads_dy[i] = pass.with_grad || pass.with_sums;
  if (plan.reads_dy[i]) plan.dy_pass[i] = plan_weight_grad(pass, target);
  if (plan.reads_dy[i] && !plan.dy_pass[i].served) return plan.dy_pass[i].reason;
  plan.dy[i].from = a.dy;  // down_proj takes it as it lies
  if (plan.has_dx || (plan.reads_dy[i] && !plan.dy_pass[i].empty))
    plan.dy[i] = tma_operand(a.dy, a.M, a.N);
  plan.down[i].kernel = Kernel::none;
  if (a.needs_dh() && !plan.dy_pass[i].makes_down)
    plan.down[i] = plan_down_proj(dh_args_of(a, plan.dy[i].at(nullptr), dh), target);
  return nullptr;
}

const char* plan_dx(const BackwardArgs* args, int count, const Target& target,
                    BackwardGroupPlan& plan) {
  FusedGemmArgs products[kMaxGroup];
  for (int i = 0; i < count; ++i)
    products[i] = dx_args_of(args[i], plan.dh(nullptr, i, args[i].x.dtype));
  return plan.has_dx ? plan_fused_gemm_group(products, count, true, target, {}, &plan.gemm)
                     : nullptr;
}

// Projections share a pass up to so many ranks. Beyond, a chunk has fewer rows and partial results
// outweigh a read of x, and each mask is multiplied with the ranks of all.
const char* plan_x(const BackwardArgs* args, int count, const Target& target,
                   BackwardGroupPlan& plan) {
  for (int first = 0, last = 0; first < count; first = last) {
    last = first + 1;
    if (!x_pass_of(args, plan, first, last, nullptr).with_grad) continue;
    for (; last < count; ++last) {
      const WeightGradPass wider = x_pass_of(args, plan, first, last + 1, nullptr);
      if (wider.grad.r > (wider.masked() ? 64 : 128)) break;
    }
    XPass& pass = plan.x_passes[plan.x_pass_count++];
    pass = {first, last, plan_weight_grad(x_pass_of(args, plan, first, last, nullptr), target)};
    if (!pass.plan.served) return pass.plan.reason;
  }
  plan.has_gaps &= plan.x_pass_count > 0;
  // The kernel that zeroes the gaps counts words by 32 bits.
  if (plan.has_gaps && args->M * plan.width / 2 >= int64_t{1} << 32)
    return "dh has more than 2^33 elements";
  return nullptr;
}

void place(const BackwardArgs* args, int count, BackwardGroupPlan& plan) {
  int64_t end = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = end;
    end += ceil_div(bytes, 128) * 128;
    return offset;
  };
  plan.dh_offset = reserve(args->M * plan.width * 2);
  for (int i = 0; i < count; ++i) {
    plan.dy[i].offset = reserve(plan.dy[i].bytes());
    WeightGradPlan& pass = plan.dy_pass[i];
    pass.x = plan.dy[i];
    for (TmaOperand* o : {&pass.h, &pass.down}) o->offset = reserve(o->bytes());
    if (!plan.has_dx) continue;
    FusedGemmPlan& gemm = plan.gemm.plans[i];
    gemm.x = plan.dy[i];
    gemm.h.packed = false;  // it is made here, as TMA needs it
    for (TmaOperand* o : {&gemm.weight, &gemm.up}) o->offset = reserve(o->bytes());
  }
  const int64_t x_offset = plan.x_pass_count > 0 ? reserve(plan.x_passes[0].plan.x.bytes()) : 0;
  for (int i = 0; i < count; ++i)
    if (plan.reads_dy[i])
      end = place_partials(dy_pass_of(args[i], plan.dh(nullptr, i, args[i].x.dtype)),
                           plan.dy_pass[i], end);
  for (int i = 0; i < plan.x_pass_count; ++i) {
    XPass& pass = plan.x_passes[i];
    pass.plan.h.packed = false;
    pass.plan.x.offset = x_offset;
    end = place_partials(x_pass_of(args, plan, pass.first, pass.last, nullptr), pass.plan, end);
  }
  plan.workspace_bytes = end;
}

}  // namespace

BackwardGroupPlan plan_backward_group(const BackwardArgs* args, int count, const Target& target) {
  BackwardGroupPlan plan{};
  plan.has_dx = args->need_x && args->M > 0 && args->K > 0;
  lay_out_dh(args, count, plan);
  for (int i = 0; i < count && plan.reason == nullptr; ++i)
    plan.reason = plan_dy(args[i], target, i, plan);
  if (plan.reason == nullptr) plan.reason = plan_dx(args, count, target, plan);
  if (plan.reason == nullptr) plan.reason = plan_x(args, count, target, plan);
  plan.served = plan.reason == nullptr;
  if (plan.served) place(args, count, plan);
  return plan;
}

std::string describe(const BackwardGroupPlan& plan, int count) {
  if (!plan.served) return plan.reason;
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : "; ") + what; };
  for (int i = 0; i < count; ++i) {
    const std::string of = " of projection " + std::to_string(i) + " ";
    if (plan.reads_dy[i]) add("dy pass" + of + describe(plan.dy_pass[i]));
    if (plan.down[i].kernel != Kernel::none) add("dh" + of + describe(plan.down[i]));
  }
  if (plan.has_dx) add("dx " + describe(plan.gemm));
  for (int i = 0; i < plan.x_pass_count; ++i) add("x pass " + describe(plan.x_passes[i].plan));
  return text.empty() ? "no gradient is needed" : text;
}

}  // namespace lora_kernels

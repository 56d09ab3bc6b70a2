#include "forward_group_plan.h"

namespace lora_kernels {
namespace {

// Where h of projection i is made, with the bits that it has alone.
void plan_h(const ForwardArgs& args, const ForwardPlan& alone, int i, ForwardGroupPlan& plan) {
  plan.h_padded[i] = alone.h_padded;
  if (args.down.r == 0 || args.down.M == 0) return;
  if (alone.form == ForwardForm::one_launch || alone.down.kernel == Kernel::sm90)
    plan.joined[plan.joined_count++] = i;
  else
    plan.alone[i] = alone.down;
}

const char* plan_joined(const ForwardArgs* args, const Target& target, ForwardGroupPlan& plan) {
  DownProjArgs joined[kMaxGroup];
  for (int i = 0; i < plan.joined_count; ++i) {
    const DownProjArgs& down = args[plan.joined[i]].down;
    plan.lora_a[plan.joined[i]] = tma_operand(down.down, down.r, down.K);
  }
  joined_args_of(args, plan, nullptr, joined);
  if (plan.joined_count == 0) return nullptr;
  plan.down = plan_down_proj_group(joined, plan.joined_count, target);
  return plan.down.served ? nullptr : plan.down.reason;
}

void place(const ForwardArgs* args, int count, ForwardGroupPlan& plan) {
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = plan.workspace_bytes;
    plan.workspace_bytes += ceil_div(bytes, 128) * 128;
    return offset;
  };
  plan.x.offset = reserve(plan.x.bytes());
  for (int i = 0; i < count; ++i)
    if (plan.h_padded[i])
      plan.h_offset[i] = reserve(args[i].down.M * ceil_div(args[i].down.r, 8) * 16);
  for (int i = 0; i < plan.joined_count; ++i) {
    TmaOperand& a = plan.lora_a[plan.joined[i]];
    a.offset = reserve(a.bytes());
  }
  for (int i = 0; i < plan.output_count; ++i) {
    FusedGemmPlan& gemm = plan.gemm.plans[i];
    gemm.x = plan.x;
    gemm.h.packed = false;  // it is made here, as TMA needs it
    for (TmaOperand* o : {&gemm.weight, &gemm.up, &gemm.bias}) o->offset = reserve(o->bytes());
  }
}

}  // namespace

ForwardGroupPlan plan_forward_group(const ForwardArgs* args, int count, const Target& target) {
  ForwardGroupPlan plan{};
  FusedGemmArgs outputs[kMaxGroup];
  for (int i = 0; i < count; ++i) {
    const ForwardPlan alone = plan_forward(args[i], target);
    plan.reason = alone.reason;
    plan.alone[i].kernel = Kernel::none;
    if (!alone.served) return plan;
    plan.decoded[i] = alone.form == ForwardForm::decode;
    plan.decode[i] = alone.decode;
    if (plan.decoded[i]) continue;
    if (!alone.gemm.empty) {
      outputs[plan.output_count] = args[i].gemm;
      plan.outputs[plan.output_count++] = i;
      plan.x = alone.gemm.x;
    }
    plan_h(args[i], alone, i, plan);
  }
  if (plan.joined_count > 0) plan.x = tma_operand(args->down.x, args->down.M, args->down.K);
  plan.reason = plan_joined(args, target, plan);
  if (plan.reason == nullptr && plan.output_count > 0)
    plan.reason = plan_fused_gemm_group(outputs, plan.output_count, false, target, {}, &plan.gemm);
  plan.served = plan.reason == nullptr;
  if (plan.served) place(args, count, plan);
  return plan;
}

std::string describe(const ForwardGroupPlan& plan, int count) {
  if (!plan.served) return plan.reason;
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : "; ") + what; };
  if (plan.joined_count > 0)
    add("h of " + std::to_string(plan.joined_count) + " " + describe(plan.down));
  for (int i = 0; i < count; ++i)
    if (plan.alone[i].kernel != Kernel::none)
      add("h of projection " + std::to_string(i) + " " + describe(plan.alone[i]));
  if (plan.output_count > 0) add(describe(plan.gemm));
  for (int i = 0; i < count; ++i)
    if (plan.decoded[i]) add("projection " + std::to_string(i) + " " + describe(plan.decode[i]));
  return text.empty() ? "there is nothing to do" : text;
}

}  // namespace lora_kernels

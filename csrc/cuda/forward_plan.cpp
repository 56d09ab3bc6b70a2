#include "forward_plan.h"

#include <algorithm>
#include <cstdio>

namespace lora_kernels {
namespace {

// The model, at a clock of 1.6 GHz; docs/fused_gemm.md says where each number is from.
constexpr double kClock = 1.6e9, kMemory = 3.0e12;  // 1/s, bytes/s
constexpr double kLaunchSeconds = 1.5e-6;           // that overlapping leaves of a second launch
constexpr double kStreamBytes = 51;                 // a clock, of one multiprocessor
constexpr double kDropoutClocks = 390;              // of a 128x64 tile of x
constexpr double kItemClocks = 2000, kFlagClocks = 1500;

// Clocks of one cluster for the h of 256 rows.
double h_cycles(const ForwardArgs& a, int rank) {
  const double stream = 128 * kRowBytes / kStreamBytes;
  const double multiply = 8 * std::max(rank / 2.0, 16 + rank / 4.0);
  const double mask = a.down.dropout.seed != nullptr ? kDropoutClocks : 0;
  const auto blocks = static_cast<double>(ceil_div(a.down.K, kRowElements));
  return blocks * std::max({stream, multiply, mask}) + kItemClocks;
}

double overhead_of(const ForwardArgs& a, const ForwardPlan& plan) {
  const FusedGemmPlan& gemm = plan.gemm;
  if (a.down.r == 0 || gemm.empty) return 0;
  const int64_t steps = ceil_div(a.down.K, kMmaDepth), extra = ceil_div(a.down.r, kMmaDepth);
  const int64_t tiles = gemm.raster.items(), waves = ceil_div(tiles, gemm.clusters);
  const double tile = tile_cycles(gemm.tile_n, steps), frozen = gemm_cycles(gemm, a.down.K);
  double cost = static_cast<double>(waves) * (tile_cycles(gemm.tile_n, steps + extra) - tile);
  if (plan.form == ForwardForm::one_launch) {
    // What the last wave leaves idle takes h for nothing.
    const double h = h_cycles(a, plan.rank);
    const double idle = static_cast<double>(waves * gemm.clusters - tiles) * tile;
    const double left = static_cast<double>(gemm.raster.pairs) * h - idle;
    if (left > 0) cost += left / gemm.clusters + h;
    cost += kFlagClocks;
  } else {
    const double bytes = static_cast<double>(a.down.M) * static_cast<double>(a.down.K) * 2;
    cost += (bytes / kMemory + kLaunchSeconds) * kClock;
  }
  return cost / frozen;
}

// nullptr if h can be made in fused_gemm's grid, else why not.
const char* not_one_launch(const ForwardArgs& a, const FusedGemmPlan& gemm) {
  if (a.down.r == 0) return "there is no LoRA term";
  if (gemm.empty) return "y is empty";
  if (a.down.r > kForwardRanks[1]) return "r is more than 128";
  if (gemm.mn_major) return "the weight is transposed";
  return nullptr;
}

}  // namespace

ForwardPlan plan_forward(const ForwardArgs& args, const Target& target,
                         const ForwardRequest& request) {
  ForwardPlan plan{};
  plan.gemm = plan_fused_gemm(args.gemm, target, request.gemm);
  plan.served = plan.gemm.served;
  plan.reason = plan.gemm.reason;
  if (!plan.served) return plan;
  const char* two = not_one_launch(args, plan.gemm);
  if (two == nullptr && request.form == ForwardForm::two_launches)
    two = "two launches were asked for";
  plan.reason = two == nullptr ? "h fits into the grid of fused_gemm" : two;
  plan.form = two == nullptr ? ForwardForm::one_launch : ForwardForm::two_launches;
  if (request.form == ForwardForm::one_launch && two != nullptr) plan.served = false;

  // h is written here, so it is never copied in; rows that TMA cannot read are made elsewhere.
  plan.h_padded = plan.gemm.h.packed;
  plan.gemm.h.packed = false;
  plan.workspace_bytes = place_packed(plan.gemm);
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = plan.workspace_bytes;
    plan.workspace_bytes += (bytes + 127) / 128 * 128;
    return offset;
  };
  if (plan.h_padded) plan.h_offset = reserve(args.down.M * plan.gemm.h.width() * 2);
  if (plan.form == ForwardForm::one_launch) {
    plan.rank = kForwardRanks[args.down.r > kForwardRanks[0]];
    plan.lora_a = tma_operand(args.down.down, args.down.r, args.down.K);
    plan.lora_a.offset = reserve(plan.lora_a.bytes());
    plan.raster = plan.gemm.raster;
    ++plan.raster.columns;
    plan.clusters = clusters_of(target, plan.raster.items());
    plan.sync_bytes = (1 + 2 * int64_t{plan.raster.pairs}) * 4;
    plan.sync_offset = reserve(plan.sync_bytes);
  } else {
    DownProjArgs down = args.down;
    if (plan.gemm.x.packed) down.x = plan.gemm.x.at(nullptr);
    if (plan.h_padded) down.h = {nullptr, plan.gemm.h.width(), 1, down.h.dtype};
    plan.down = plan_down_proj(down, target);
  }
  plan.overhead = overhead_of(args, plan);
  return plan;
}

unsigned pack_blocks(const PackJobs& jobs, int multiprocessors) {
  int64_t most = 1;
  for (int i = 0; i < jobs.count; ++i)
    most = std::max(most, ceil_div(jobs.jobs[i].rows * jobs.jobs[i].width, kPackThreads));
  return static_cast<unsigned>(std::min<int64_t>(most, 8 * int64_t{multiprocessors}));
}

std::string describe(const ForwardPlan& plan) {
  if (!plan.served) return plan.reason;
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.1f %%", 100 * plan.overhead);
  const bool one = plan.form == ForwardForm::one_launch;
  std::string text = one ? "one launch (" : "two launches (";
  text += std::string(plan.reason) + "): ";
  if (!one && plan.down.kernel != DownProjKernel::none) text += describe(plan.down) + "; ";
  text += describe(plan.gemm);
  if (one && plan.lora_a.packed) text += "; A copied first";
  if (plan.h_padded) text += "; h copied out of padded rows";
  return text + "; LoRA term " + percent + " over the frozen GEMM by the model";
}

}  // namespace lora_kernels

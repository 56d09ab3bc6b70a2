#include "forward_plan.h"

#include <algorithm>
#include <cstdio>

#include "model.h"

namespace lora_kernels {
namespace {

constexpr uint32_t kMaxChain = 4;

// Clocks of one cluster for the h of 256 rows.
double h_cycles(const ForwardArgs& a, int rank) {
  const double stream = 128 * kRowBytes / kStreamBytes;
  const double multiply = 8 * std::max(rank / 2.0, 16 + rank / 4.0);
  const double mask = a.down.dropout.seed != nullptr ? kDropoutClocks : 0;
  const auto blocks = static_cast<double>(ceil_div(a.down.K, kRowElements));
  return blocks * std::max({stream, multiply, mask}) + kItemClocks;
}

// What the LoRA term adds to the frozen GEMM: clocks.
double two_launches_cost(const ForwardArgs& a) {
  const double bytes = static_cast<double>(a.down.M) * static_cast<double>(a.down.K) * 2;
  return memory_clocks(bytes) + kLaunchSeconds * kClock;
}

// A chain takes a cluster a turn of its own. Turns that the last wave leaves idle are free; else
// some cluster, and so the call, takes a chain longer.
double one_launch_cost(const FusedGemmPlan& gemm, const Raster& raster, unsigned clusters,
                       double tile, double h) {
  const int64_t tiles = gemm.raster.items(), chains = raster.chains();
  const int64_t idle = ceil_div(tiles, clusters) * clusters - tiles;
  const double left = static_cast<double>(raster.pairs) * h - static_cast<double>(idle) * tile;
  return std::max(0.0, left) / clusters + (chains % clusters > idle ? raster.chain * h : 0) +
         kFlagClocks + kZeroSeconds * kClock;
}

// Chooses the chains, whether they come first, and the grid of one launch; its cost.
double choose_chains(const ForwardArgs& a, const Target& target, uint32_t wanted,
                     ForwardPlan& plan) {
  const double h = h_cycles(a, plan.rank);
  const double tile = tile_cycles(plan.gemm.tile_n, ceil_div(a.down.K, kMmaDepth));
  double least = -1;
  const uint32_t first = wanted > 0 ? wanted : 1, last = wanted > 0 ? wanted : kMaxChain;
  for (uint32_t chain = first; chain <= last; ++chain) {
    if (chain > first && (chain * h > tile || chain > plan.gemm.raster.group)) break;
    const Raster& tiles = plan.gemm.raster;
    Raster raster(tiles.pairs, tiles.columns, tiles.group, chain);
    const unsigned clusters = clusters_of(target, raster.items());
    // A quarter of the clusters loads x about as fast as memory gives it.
    if (ceil_div(tiles.pairs, chain) <= (clusters + 3) / 4)
      raster = Raster(tiles.pairs, tiles.columns, tiles.group, chain, true);
    const double cost = one_launch_cost(plan.gemm, raster, clusters, tile, h);
    if (least >= 0 && cost >= least) continue;
    least = cost;
    plan.raster = raster;
    plan.clusters = clusters;
  }
  return least;
}

// nullptr if h can be made in fused_gemm's grid, else why not.
const char* not_one_launch(const ForwardArgs& a, const FusedGemmPlan& gemm) {
  if (gemm.r == 0) return "there is no LoRA term";
  if (gemm.empty) return "y is empty";
  if (gemm.kernel == Kernel::sm80) return "only the sm_90a kernel has that form";
  if (a.down.r > kForwardRanks[1]) return "r is more than 128";
  if (gemm.mn_major) return "the weight is transposed";
  return nullptr;
}

// The form, its grid and its cost, for a gemm that is planned.
void choose_form(const ForwardArgs& args, const Target& target, const ForwardRequest& request,
                 ForwardPlan& plan) {
  const ForwardForm wanted = request.form;
  const char* one = not_one_launch(args, plan.gemm);
  plan.form = ForwardForm::two_launches;
  plan.reason = one;
  if (wanted == ForwardForm::one_launch && one != nullptr) plan.served = false;
  if (args.down.r == 0 || plan.gemm.empty) return;
  double cost = two_launches_cost(args);
  if (one == nullptr) {
    plan.rank = kForwardRanks[args.down.r > kForwardRanks[0]];
    const double in_one = choose_chains(args, target, request.chain, plan);
    const bool better = in_one < cost;
    plan.reason = better ? "h takes turns that the grid has left, by the model"
                         : "h would take more turns than memory takes time, by the model";
    if (wanted != ForwardForm::any) plan.reason = "as was asked for";
    if (wanted == ForwardForm::one_launch || (wanted == ForwardForm::any && better)) {
      plan.form = ForwardForm::one_launch;
      cost = in_one;
    }
  }
  const int64_t depth = ceil_div(args.down.K, kMmaDepth) * kMmaDepth;
  cost += gemm_cycles(plan.gemm, depth + args.down.r) - gemm_cycles(plan.gemm, depth);
  plan.overhead = cost / gemm_cycles(plan.gemm, args.down.K);
}

// Seconds of a planned form, at least those of its bytes.
double seconds_of(const ForwardPlan& plan, const DecodePlan& decode, int64_t K) {
  const double clocks = (1 + plan.overhead) * gemm_cycles(plan.gemm, K);
  const double clock = plan.gemm.kernel == Kernel::sm80 ? kClockSm80 : kClock;
  return std::max(clocks / clock, decode.floor_seconds);
}

// Whether decode serves the call: it is decided ahead of the others, which may serve nothing here.
bool takes_decode(const ForwardArgs& args, const Target& target, const ForwardRequest& request,
                  ForwardPlan& plan) {
  const bool any = request.form == ForwardForm::any;
  if (!any && request.form != ForwardForm::decode) return false;
  const DecodePlan decode = plan_decode(args, target, request.decode);
  if (any && (!decode.served || request.gemm.tile_n > 0 || request.gemm.group > 0)) return false;
  if (any) {
    ForwardRequest others = request;
    others.form = ForwardForm::two_launches;
    const ForwardPlan other = plan_forward(args, target, others);
    if (other.served && (decode.empty || other.gemm.empty)) return false;
    // The model of the others leaves out that few blocks cannot keep memory busy.
    constexpr double kClearly = 1.1;
    const double seconds = other.served ? seconds_of(other, decode, args.down.K) : 0;
    if (other.served && decode.seconds >= kClearly * seconds) return false;
  }
  plan.served = decode.served;
  plan.reason = decode.reason;
  plan.form = ForwardForm::decode;
  plan.decode = decode;
  ForwardArgs frozen = args;
  frozen.down.r = frozen.gemm.r = 0;
  const double without = plan_decode(frozen, target, request.decode).seconds;
  if (decode.served && without > 0) plan.overhead = std::max(0.0, decode.seconds / without - 1);
  return true;
}

}  // namespace

ForwardPlan plan_forward(const ForwardArgs& args, const Target& target,
                         const ForwardRequest& request) {
  ForwardPlan plan{};
  if (takes_decode(args, target, request, plan)) return plan;
  plan.gemm = plan_fused_gemm(args.gemm, target, request.gemm);
  plan.served = plan.gemm.served;
  plan.reason = plan.gemm.reason;
  if (plan.served) choose_form(args, target, request, plan);
  if (!plan.served) return plan;

  // h is written here, so it is never copied in; rows that TMA cannot read are made elsewhere.
  plan.h_padded = plan.gemm.h.packed;
  plan.gemm.h.packed = false;
  plan.workspace_bytes = place_packed(plan.gemm);
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = plan.workspace_bytes;
    plan.workspace_bytes += ceil_div(bytes, 128) * 128;
    return offset;
  };
  if (plan.h_padded) plan.h_offset = reserve(args.down.M * plan.gemm.h.width() * 2);
  if (plan.form == ForwardForm::one_launch) {
    plan.lora_a = tma_operand(args.down.down, args.down.r, args.down.K);
    plan.lora_a.offset = reserve(plan.lora_a.bytes());
    plan.sync_words = 1 + 2 * int64_t{plan.raster.pairs};
    plan.sync_offset = reserve(4 * plan.sync_words);
  } else {
    DownProjArgs down = args.down;
    if (plan.gemm.x.packed) down.x = plan.gemm.x.at(nullptr);
    if (plan.h_padded) down.h = {nullptr, plan.gemm.h.width(), 1, down.h.dtype};
    plan.down = plan_down_proj(down, target);
  }
  return plan;
}

unsigned pack_blocks(const PackJobs& jobs, int multiprocessors) {
  int64_t most = 1;
  for (int i = 0; i < jobs.count; ++i)
    most = std::max(most, jobs.jobs[i].height * pieces_of(jobs.jobs[i]));
  return static_cast<unsigned>(std::min<int64_t>(most, 8 * int64_t{multiprocessors}));
}

std::string describe(const ForwardPlan& plan) {
  if (!plan.served) return plan.reason;
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.1f %%", 100 * plan.overhead);
  if (plan.form == ForwardForm::decode)
    return "one launch for few rows (" + std::string(plan.reason) + "): " + describe(plan.decode) +
           "; LoRA term " + percent + " over the frozen product by the model";
  const bool one = plan.form == ForwardForm::one_launch;
  std::string text = one ? "one launch (" : "two launches (";
  text += std::string(plan.reason) + "): ";
  if (!one && plan.down.kernel != Kernel::none) text += describe(plan.down) + "; ";
  text += one ? describe(plan.gemm, plan.raster, plan.clusters) : describe(plan.gemm);
  if (one && plan.lora_a.packed) text += "; A copied first";
  if (plan.h_padded) text += "; h copied out of padded rows";
  if (plan.gemm.kernel == Kernel::sm80) return text;  // the model is of a Hopper
  return text + "; LoRA term " + percent + " over the frozen GEMM by the model";
}

}  // namespace lora_kernels

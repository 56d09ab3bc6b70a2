#include "fused_gemm_plan.h"

#include <algorithm>

namespace lora_kernels {
namespace {

// Pairs of row blocks, at most: 66 clusters then work on about 8 x 8 tiles.
constexpr int64_t kGroup = 8;

// nullptr if the kernel serves the call, else why it does not.
const char* not_served(const FusedGemmArgs& a, const Target& target) {
  if (const char* reason = no_sm90a(target)) return reason;

  if (std::max({a.M, a.N, a.K, a.r}) >= kTmaLimit - kClusterRows)
    return "a dimension is past 2^31, which TMA cannot address";
  if (ceil_div(a.M, kClusterRows) * (ceil_div(a.N, 64) + 1) >= kTmaLimit)
    return "y has more than 2^31 tiles";
  return nullptr;
}

struct TileFacts {
  int n, stages, threads, shared_bytes;
};
#define LK_FACTS(...)                                                           \
  {FusedGemmSm90Tile<__VA_ARGS__>::kN, FusedGemmSm90Tile<__VA_ARGS__>::kStages, \
   FusedGemmSm90Tile<__VA_ARGS__>::kThreads, FusedGemmSm90Tile<__VA_ARGS__>::kSharedBytes},
constexpr TileFacts kTiles[] = {LK_FUSED_GEMM_SM90_TILES(LK_FACTS)};
#undef LK_FACTS

// Outputs whose tiles stand side by side.
struct Outputs {
  const FusedGemmArgs* args;
  int count;

  int64_t columns(int tile_n) const {
    int64_t columns = 0;
    for (int i = 0; i < count; ++i) columns += ceil_div(args[i].N, tile_n);
    return columns;
  }
};

// Groups as even as possible: one of a pair or two would load all of W for little.
Raster raster_of(const Outputs& outputs, int tile_n, int wanted_group) {
  const int64_t pairs = ceil_div(outputs.args->M, kClusterRows), wanted = wanted_group;
  const int64_t group =
      wanted > 0 ? std::min(wanted, pairs) : ceil_div(pairs, ceil_div(pairs, kGroup));
  return {static_cast<uint32_t>(pairs), static_cast<uint32_t>(outputs.columns(tile_n)),
          static_cast<uint32_t>(group)};
}

double waves_cycles(const Raster& raster, unsigned clusters, int tile_n, int64_t K) {
  const auto waves = ceil_div(raster.items(), clusters);
  return static_cast<double>(waves) * tile_cycles(tile_n, ceil_div(K, kMmaDepth));
}

// The tile whose waves take the fewest clocks; the widest of equals.
const TileFacts& best_tile(const Outputs& outputs, int64_t K, const Target& target, int wanted) {
  const TileFacts* best = nullptr;
  double least = 0;
  for (const TileFacts& t : kTiles) {
    const Raster raster = raster_of(outputs, t.n, 0);
    const double cycles = waves_cycles(raster, clusters_of(target, raster.items()), t.n, K);
    if (t.n == wanted) return t;
    if (best == nullptr || cycles < least) best = &t, least = cycles;
  }
  return *best;
}

}  // namespace

// A k16 step keeps the tensor cores busy for kN clocks. Narrower tiles are bound by shared memory
// instead, 128 bytes a clock: wgmma reads 2 (2048 + 32 kN) bytes, TMA writes 32 (128 + kN). The
// factor is what a good main loop reaches of that; the epilogue stands outside it.
double tile_cycles(int tile_n, int64_t steps) {
  constexpr double kReached = 0.865, kEpilogue = 6.0;  // clocks a column
  const double shared = (2 * (2048 + 32.0 * tile_n) + 32 * (128.0 + tile_n)) / 128;
  return static_cast<double>(steps) * std::max<double>(tile_n, shared) / kReached +
         kEpilogue * tile_n;
}

double gemm_cycles(const FusedGemmPlan& plan, int64_t K) {
  return waves_cycles(plan.raster, plan.clusters, plan.tile_n, K);
}

FusedGemmPlan plan_fused_gemm(const FusedGemmArgs& args, const Target& target,
                              const FusedGemmRequest& request) {
  FusedGemmPlan plan{};
  plan.empty = args.M == 0 || args.N == 0;
  plan.reason = not_served(args, target);
  plan.served = plan.reason == nullptr;
  if (plan.empty || !plan.served) return plan;
  plan.reason = "TMA and wgmma";
  const Outputs output{&args, 1};
  const TileFacts& tile = best_tile(output, args.K, target, request.tile_n);
  plan.tile_n = tile.n;
  plan.stages = tile.stages;
  plan.threads = tile.threads;
  plan.shared_bytes = tile.shared_bytes;

  const TmaOperand weight = tma_operand(args.weight, args.N, args.K);
  const TmaOperand mn_weight = tma_operand(transposed(args.weight), args.K, args.N);
  plan.r = args.scale == 0 ? 0 : args.r;
  plan.masked = args.dropout.seed != nullptr && plan.r > 0;
  // One that is copied either way keeps the order it has.
  const bool in_columns = args.weight.row_stride == 1 && args.weight.col_stride != 1;
  plan.mn_major = plan.masked || request.mn_major ||
                  (weight.packed && args.K > 0 && (!mn_weight.packed || in_columns));
  plan.x = tma_operand(args.x, args.M, args.K);
  plan.h = tma_operand(args.h, args.M, args.r);
  plan.weight = plan.mn_major ? mn_weight : weight;
  plan.up = plan.mn_major ? tma_operand(transposed(args.up), args.r, args.N)
                          : tma_operand(args.up, args.N, args.r);
  if (plan.r == 0) plan.h.packed = plan.up.packed = false;  // nothing is loaded of them
  if (args.bias.data != nullptr) plan.bias = tma_operand(args.bias, 1, args.N);
  plan.y_vectors = !tma_operand(args.y, args.M, args.N).packed;
  plan.raster = raster_of(output, tile.n, request.group);
  plan.clusters = clusters_of(target, plan.raster.items());
  return plan;
}

const char* plan_fused_gemm_group(const FusedGemmArgs* args, int count, bool added,
                                  const Target& target, const FusedGemmRequest& request,
                                  FusedGemmGroup* group) {
  *group = {{}, {}, count, added, {}, 0};
  const Outputs outputs{args, group->outputs()};
  int64_t depth = 0, tiles = 0;
  for (int i = 0; i < count; ++i) {
    if (const char* reason = not_served(args[i], target)) return reason;
    depth = added ? depth + args[i].K : std::max(depth, args[i].K);
    tiles += ceil_div(args[i].M, kClusterRows) * (ceil_div(args[i].N, 64) + 1);
  }
  if (tiles >= kTmaLimit) return "the outputs have more than 2^31 tiles";
  FusedGemmRequest each = request;
  each.tile_n = best_tile(outputs, depth, target, request.tile_n).n;
  // Where some are MN-major all are: at most one more turn.
  for (bool again = true; again;) {
    again = false;
    for (int i = 0; i < count; ++i) {
      group->args[i] = args[i];
      group->plans[i] = plan_fused_gemm(args[i], target, each);
      again |= group->plans[i].mn_major && !each.mn_major && count > 1;
    }
    each.mn_major |= again;
  }
  group->raster = raster_of(outputs, each.tile_n, request.group);
  group->clusters = clusters_of(target, group->raster.items());
  return nullptr;
}

int64_t place_packed(FusedGemmPlan& plan) {
  int64_t offset = 0;
  for (TmaOperand* operand : {&plan.x, &plan.weight, &plan.h, &plan.up, &plan.bias}) {
    operand->offset = offset;
    offset += operand->bytes();
  }
  return offset;
}

namespace {

std::string describe_packing(const FusedGemmPlan& p) {
  std::string copied;
  const auto add = [&](const TmaOperand& operand, const char* name) {
    if (operand.packed) copied += (copied.empty() ? "" : ", ") + std::string(name);
  };
  add(p.x, "x");
  add(p.weight, "weight");
  add(p.h, "h");
  add(p.up, "B");
  add(p.bias, "bias");
  std::string text;
  if (!copied.empty()) text = "; copied first, into rows that TMA can address: " + copied;
  if (!p.y_vectors) text += "; y by ordinary stores: its rows are not on 16-byte boundaries";
  return text;
}

std::string describe_tiles(const FusedGemmPlan& p, const Raster& raster, unsigned clusters,
                           bool masked) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  const int64_t tiles = raster.items() - raster.chains(), tenths = tiles * 10 / clusters;
  return "fused_gemm_sm90 128x" + number(p.tile_n) + "x64, " + number(p.stages) + " stages, " +
         number(2 * clusters) + " blocks in clusters of 2, " + number(tiles) +
         " tiles of 256 rows, " + number(tenths / 10) + "." + number(tenths % 10) + " waves" +
         (raster.chain > 0 ? ", " + number(raster.chains()) + " chains of h" : "") + ", " +
         (p.mn_major ? "MN" : "K") + "-major weight, " + (masked ? "masked LoRA term, " : "") +
         number(p.shared_bytes / 1024) + " KB shared";
}

}  // namespace

std::string describe(const FusedGemmPlan& p, const Raster& raster, unsigned clusters) {
  if (!p.served) return p.reason;
  if (p.empty) return "y is empty";
  return describe_tiles(p, raster, clusters, p.masked) + describe_packing(p);
}

std::string describe(const FusedGemmGroup& group) {
  std::string text = group.added ? "a sum of " : "";
  text += std::to_string(group.count) + (group.added ? " products" : " outputs") + " in one " +
          describe_tiles(group.plans[0], group.raster, group.clusters, group.masked());
  for (int i = 0; i < group.count; ++i) {
    const std::string copies = describe_packing(group.plans[i]);
    if (!copies.empty()) text += "; of projection " + std::to_string(i) + copies;
  }
  return text;
}

std::string describe(const FusedGemmPlan& p) { return describe(p, p.raster, p.clusters); }

}  // namespace lora_kernels

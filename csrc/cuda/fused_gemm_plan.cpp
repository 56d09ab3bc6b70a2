#include "fused_gemm_plan.h"

#include <algorithm>

namespace lora_kernels {
namespace {

// Pairs of row blocks, at most: 66 clusters then work on about 8 x 8 tiles.
constexpr int64_t kGroup = 8;

// nullptr if TMA and wgmma serve the call, else why they do not.
const char* not_sm90(const FusedGemmArgs& a, const Target& target) {
  if (const char* reason = no_sm90a(target)) return reason;
  if (std::max({a.M, a.N, a.K, a.r}) >= kTmaLimit - kClusterRows)
    return "a dimension is past 2^31, which TMA cannot address";
  return nullptr;
}

// nullptr if some kernel serves the call, else why none does.
const char* not_served(const FusedGemmArgs& a, const Target& target) {
  if (target.compute < 80) return "the device is older than compute capability 8.0";
  if (std::max({a.M, a.N, a.K, a.r}) >= kTmaLimit * kSm80Depth)
    return "a dimension is past 2^36, more stages than are counted";
  if (a.dropout.seed != nullptr && a.N >= int64_t{1} << 32)
    return "the mask has more than 2^32 columns, which are counted by 32 bits";
  if (ceil_div(a.M, 64) * (ceil_div(a.N, 64) + 1) >= kTmaLimit) return "y has more than 2^31 tiles";
  return nullptr;
}

struct TileFacts {
  Kernel kernel;
  int m, n, stages, threads, shared_bytes;

  int64_t rows_of_pair() const { return kernel == Kernel::sm90 ? 2 * m : m; }
};
template <class Tile>
constexpr TileFacts facts(Kernel kernel) {
  return {kernel, Tile::kM, Tile::kN, Tile::kStages, Tile::kThreads, Tile::kSharedBytes};
}
#define LK_FACTS_80(...) facts<FusedGemmSm80Tile<__VA_ARGS__>>(Kernel::sm80),
#define LK_FACTS_90(...) facts<FusedGemmSm90Tile<__VA_ARGS__>>(Kernel::sm90),
constexpr TileFacts kTiles[] = {LK_FUSED_GEMM_SM90_TILES(LK_FACTS_90)
                                    LK_FUSED_GEMM_SM80_TILES(LK_FACTS_80)};
#undef LK_FACTS_80
#undef LK_FACTS_90

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
Raster raster_of(const Outputs& outputs, const TileFacts& tile, int wanted_group) {
  const int64_t pairs = ceil_div(outputs.args->M, tile.rows_of_pair()), wanted = wanted_group;
  const int64_t group =
      wanted > 0 ? std::min(wanted, pairs) : ceil_div(pairs, ceil_div(pairs, kGroup));
  return {static_cast<uint32_t>(pairs), static_cast<uint32_t>(outputs.columns(tile.n)),
          static_cast<uint32_t>(group)};
}

double waves_cycles(Kernel kernel, const Raster& raster, unsigned at_a_time, int tile_n,
                    int64_t K) {
  const int64_t steps = ceil_div(K, kMmaDepth);
  return static_cast<double>(ceil_div(raster.items(), at_a_time)) *
         (kernel == Kernel::sm90 ? tile_cycles(tile_n, steps) : sm80_tile_cycles(tile_n, steps));
}

// Clusters, or the blocks of sm_80 that multiprocessors take at a time.
unsigned at_a_time(Kernel kernel, const Target& target, const Raster& raster) {
  if (kernel == Kernel::sm90) return clusters_of(target, raster.items());
  return std::min(raster.items(), static_cast<unsigned>(std::max(1, target.multiprocessors)));
}

// The tile whose waves take the fewest clocks; the widest of equals.
const TileFacts& best_tile(const Outputs& outputs, int64_t K, const Target& target, Kernel kernel,
                           int wanted) {
  const TileFacts* best = nullptr;
  double least = 0;
  for (const TileFacts& t : kTiles) {
    if (t.kernel != kernel) continue;
    const Raster raster = raster_of(outputs, t, 0);
    const double cycles = waves_cycles(kernel, raster, at_a_time(kernel, target, raster), t.n, K);
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

// mma.sync takes 1024 products a clock on an A100. Its warps read their rows and columns of each
// k16 step from shared memory, into which cp.async writes those of the tile, 128 bytes a clock in
// all.
double sm80_tile_cycles(int tile_n, int64_t steps) {
  constexpr double kReached = 0.8, kEpilogue = 6.0;  // clocks a column of 128 rows
  double cycles = 0;
  with_fused_gemm_sm80_tile(tile_n, [&](auto tile) {
    using Tile = decltype(tile);
    constexpr int kRead = Tile::kThreads / 32 * (Tile::kWarpRows + Tile::kWarpColumns);
    constexpr double kProducts = Tile::kM * Tile::kN * 16.0 / 1024;
    constexpr double kShared = (kRead + Tile::kM + Tile::kN) * 32.0 / 128;
    cycles = static_cast<double>(steps) * std::max(kProducts, kShared) / kReached +
             kEpilogue * Tile::kN * Tile::kM / 128;
  });
  return cycles;
}

double gemm_cycles(const FusedGemmPlan& plan, int64_t K) {
  return waves_cycles(plan.kernel, plan.raster, plan.clusters, plan.tile_n, K);
}

FusedGemmPlan plan_fused_gemm(const FusedGemmArgs& args, const Target& target,
                              const FusedGemmRequest& request) {
  FusedGemmPlan plan{};
  plan.empty = args.M == 0 || args.N == 0;
  plan.reason = not_served(args, target);
  plan.served = plan.reason == nullptr;
  if (plan.empty || !plan.served) return plan;
  const char* fallback = request.kernel == Kernel::sm80 ? "as others of its group" : nullptr;
  if (const char* reason = not_sm90(args, target)) fallback = reason;
  plan.kernel = fallback == nullptr ? Kernel::sm90 : Kernel::sm80;
  plan.reason = fallback == nullptr ? "TMA and wgmma" : fallback;
  const Outputs output{&args, 1};
  const TileFacts& tile = best_tile(output, args.K, target, plan.kernel, request.tile_n);
  plan.tile_m = tile.m;
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
  // A TMA store writes whole 16 bytes, past the end of a row that does not end on them.
  plan.y_vectors = args.N % 8 == 0 && !tma_operand(args.y, args.M, args.N).packed;
  plan.raster = raster_of(output, tile, request.group);
  plan.clusters = at_a_time(plan.kernel, target, plan.raster);
  return plan;
}

const char* plan_fused_gemm_group(const FusedGemmArgs* args, int count, bool added,
                                  const Target& target, const FusedGemmRequest& request,
                                  FusedGemmGroup* group) {
  *group = {{}, {}, count, added, {}, 0};
  const Outputs outputs{args, group->outputs()};
  int64_t depth = 0, tiles = 0;
  FusedGemmRequest each = request;
  for (int i = 0; i < count; ++i) {
    if (const char* reason = not_served(args[i], target)) return reason;
    depth = added ? depth + args[i].K : std::max(depth, args[i].K);
    tiles += ceil_div(args[i].M, 64) * (ceil_div(args[i].N, 64) + 1);
    if (not_sm90(args[i], target) != nullptr) each.kernel = Kernel::sm80;
  }
  if (tiles >= kTmaLimit) return "the outputs have more than 2^31 tiles";
  const Kernel kernel = each.kernel == Kernel::sm80 ? Kernel::sm80 : Kernel::sm90;
  const TileFacts& tile = best_tile(outputs, depth, target, kernel, request.tile_n);
  each.tile_n = tile.n;
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
  group->raster = raster_of(outputs, tile, request.group);
  group->clusters = at_a_time(kernel, target, group->raster);
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
  if (!copied.empty()) text = "; copied first, into rows on 16-byte boundaries: " + copied;
  if (!p.y_vectors) text += "; y by ordinary stores: its rows are not on 16-byte boundaries";
  return text;
}

std::string describe_tiles(const FusedGemmPlan& p, const Raster& raster, unsigned clusters,
                           bool masked) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (p.kernel == Kernel::sm80)
    return "fused_gemm_sm80 " + number(p.tile_m) + "x" + number(p.tile_n) + "x" +
           number(kSm80Depth) + " (" + p.reason + "), " + number(p.stages) + " stages, " +
           number(raster.items()) + " tiles, " + (p.mn_major ? "MN" : "K") + "-major weight, " +
           (masked ? "masked LoRA term, " : "") + number(p.shared_bytes / 1024) + " KB shared";
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

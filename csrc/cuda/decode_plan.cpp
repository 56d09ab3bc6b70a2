#include "decode_plan.h"

#include <algorithm>
#include <cstdio>
#include <tuple>

#include "model.h"

namespace lora_kernels {
namespace {

struct TileFacts {
  int m, rows, stages, resident, threads, shared_bytes, stage_bytes;
};
template <class Tile>
constexpr TileFacts facts() {
  return {Tile::kM,       Tile::kRows,        Tile::kStages,    Tile::kResident,
          Tile::kThreads, Tile::kSharedBytes, Tile::kStageBytes};
}
#define LK_FACTS(...) facts<DecodeTile<__VA_ARGS__>>(),
constexpr TileFacts kTiles[] = {LK_DECODE_TILES(LK_FACTS)};
#undef LK_FACTS

// nullptr if the kernel serves the call, else why it does not.
const char* not_served(const ForwardArgs& a, const Target& target) {
  const FusedGemmArgs& g = a.gemm;
  if (target.compute < 80) return "the device is of a compute capability below 8.0";
  if (g.M > kDecodeRows) return "decode serves up to 64 rows";
  if (a.down.r > kDecodeRank) return "decode serves r up to 128";
  if (g.N >= kTmaLimit || g.K >= kTmaLimit) return "a dimension is past 2^31";
  if (g.K == 0) return nullptr;
  if (g.N > 0 && !has_vectors(g.weight, g.N))
    return "decode needs contiguous rows of the weight on 16-byte boundaries";
  if (a.down.r > 0 && !has_vectors(a.down.down, a.down.r))
    return "decode needs contiguous rows of A on 16-byte boundaries";
  return nullptr;
}

// A grid, and what the model says of it.
struct Grid {
  const TileFacts* tile;
  int tile_n, splits;
  int64_t tiles, stages;
  double seconds;

  int64_t blocks() const { return tiles * splits; }
};

int ranks_of(const ForwardArgs& a) { return static_cast<int>(ceil_div(a.down.r, kUnit)) * kUnit; }

// Every operand and result once.
double compulsory_bytes(const ForwardArgs& a) {
  const auto M = double(a.gemm.M), N = double(a.gemm.N), K = double(a.gemm.K), r = double(a.down.r);
  return 2 * (N * K + r * K + M * K + N * r + M * N + M * r);
}

// How many blocks of a tile share a multiprocessor's memory, which is of 228 KB on compute
// capability 9.0 and 10.0, of 164 on 8.0 and of 100 or more on others.
int resident(const TileFacts& t, const Target& target) {
  const int kilobytes = target.compute == 90 || target.compute == 100 ? 228
                        : target.compute == 80                        ? 164
                                                                      : 100;
  return std::min(t.resident, (kilobytes << 10) / (t.shared_bytes + kReservedBytes));
}

// Rates of a device, by the model, in bytes a clock.
struct Speed {
  double clock, memory, l2;
  explicit Speed(const Target& target) {
    const bool hopper = target.compute == 90;
    clock = hopper ? kClock : kClockSm80;
    memory = (hopper ? kMemory : kMemorySm80) / clock;
    l2 = (hopper ? kL2 : kL2Sm80) / clock;
  }
};

// Seconds of a grid, by the model of docs/decode.md: of each wave the longest of memory, of L2, of
// what the busiest multiprocessor loads, and of the turns of a block's ring; then the ends.
double model(const ForwardArgs& a, const Target& target, const Grid& g) {
  const Speed speed(target);
  const auto M = double(a.gemm.M), r = double(a.down.r);
  const double each = double(g.stages) * kRowBytes * (r + g.tile_n + M);
  const double share = compulsory_bytes(a) / double(g.blocks());
  const double turns = double(g.stages) / (g.tile->stages - 1) * kLatencySeconds * speed.clock;
  // Clusters leave those multiprocessors idle that no whole one fits.
  const int64_t usable = std::max(target.multiprocessors / g.splits * g.splits, 1);
  const int64_t room = usable * resident(*g.tile, target);
  const auto wave = [&](int64_t blocks) {
    return std::max({double(blocks) * share / speed.memory, double(blocks) * each / speed.l2,
                     double(ceil_div(blocks, usable)) * each / kStreamBytes, turns});
  };
  const int64_t full = g.blocks() / room, rest = g.blocks() % room;
  double clocks = double(full) * wave(room) + (rest > 0 ? wave(rest) : 0);
  clocks += double(full + (rest > 0)) * kItemClocks;
  if (g.splits > 1) {
    const double sums = (ranks_of(a) + double(g.tile_n) / g.splits) * g.tile->m * 4;
    clocks += kClusterClocks + g.splits * sums / kStreamBytes;
  }
  return clocks / speed.clock;
}

// The grid of tiles of up to `most` columns, as even as possible.
Grid grid_of(const ForwardArgs& a, const Target& target, const TileFacts& tile, int most,
             int splits) {
  const int64_t tiles = std::max<int64_t>(ceil_div(a.gemm.N, most), 1);  // one if h is all there is
  const int64_t units = std::max<int64_t>(ceil_div(ceil_div(a.gemm.N, tiles), kUnit), 1);
  const int tile_n = static_cast<int>(units) * kUnit;
  Grid g{&tile,
         tile_n,
         splits,
         std::max<int64_t>(ceil_div(a.gemm.N, tile_n), 1),
         ceil_div(ceil_div(a.gemm.K, kRowElements), splits),
         0};
  g.seconds = model(a, target, g);
  return g;
}

// Calls f for every grid that the request leaves.
template <class F>
void for_grids(const ForwardArgs& a, const Target& target, const DecodeRequest& request,
               const F& f) {
  const int64_t stages = std::max<int64_t>(ceil_div(a.gemm.K, kRowElements), 1);
  const int most_splits = no_sm90a(target) == nullptr ? kDecodeSplits : 1;  // else no clusters
  for (const TileFacts& tile : kTiles) {
    const bool fits = tile.m == (a.gemm.M <= kUnit ? kUnit : kDecodeRows);
    const int room = tile.rows - ranks_of(a);
    if (!fits || (request.rows > 0 && request.rows != tile.rows)) continue;
    if (request.tile_n % kUnit != 0 || request.tile_n > room) continue;
    for (int splits = 1; splits <= most_splits; splits *= 2) {
      if (request.splits > 0 ? request.splits != splits : splits > stages) continue;
      for (int n = request.tile_n > 0 ? request.tile_n : room; n >= kUnit;
           n = n / 2 & ~(kUnit - 1)) {
        f(grid_of(a, target, tile, n, splits));
        if (request.tile_n > 0) break;
      }
    }
  }
}

// Of the grids within 2 % of the fastest the one that leaves the fewest multiprocessors idle, then
// that of the fewest splits, then the faster. `tiles` 0 if there is none.
Grid best_grid(const ForwardArgs& a, const Target& target, const DecodeRequest& request) {
  double least = 0;
  for_grids(a, target, request, [&](const Grid& g) {
    if (least == 0 || g.seconds < least) least = g.seconds;
  });
  Grid best{};
  const auto order = [&](const Grid& g) {
    return std::make_tuple(-std::min<int64_t>(g.blocks(), target.multiprocessors), g.splits,
                           g.seconds);
  };
  for_grids(a, target, request, [&](const Grid& g) {
    if (g.seconds > 1.02 * least) return;
    if (best.tiles == 0 || order(g) < order(best)) best = g;
  });
  return best;
}

int64_t loaded_bytes(const ForwardArgs& a, const Grid& g) {
  const FusedGemmArgs& y = a.gemm;
  const int64_t bias = y.bias.data != nullptr ? y.N : 0;
  return 2 * (y.N * y.K + g.tiles * (a.down.r + y.M) * y.K + g.splits * (y.N * y.r + bias));
}

}  // namespace

DecodePlan plan_decode(const ForwardArgs& args, const Target& target,
                       const DecodeRequest& request) {
  DecodePlan plan{};
  plan.reason = not_served(args, target);
  plan.served = plan.reason == nullptr;
  plan.empty = args.gemm.M == 0 || (args.gemm.N == 0 && args.down.r == 0);
  if (!plan.served) return plan;
  plan.reason = "W is read once, by one launch";
  if (plan.empty) return plan;
  const Grid g = best_grid(args, target, request);
  if (g.tiles == 0) {
    plan.served = false;
    plan.reason = "no tile of decode has so many rows and splits here";
    return plan;
  }
  plan.m = g.tile->m;
  plan.rows = g.tile->rows;
  plan.threads = g.tile->threads;
  plan.shared_bytes = g.tile->shared_bytes;
  plan.work = {g.tile_n,
               ranks_of(args),
               g.splits,
               g.stages,
               has_vectors(args.down.x, args.down.M),
               has_vectors(args.gemm.up, args.gemm.N)};
  plan.tiles = g.tiles;
  plan.loaded_bytes = loaded_bytes(args, g);
  plan.seconds = g.seconds;
  plan.floor_seconds = compulsory_bytes(args) / (target.compute == 90 ? kMemory : kMemorySm80);
  return plan;
}

std::string describe(const DecodePlan& p) {
  if (!p.served || p.empty) return p.served ? "there is nothing to do" : p.reason;
  const auto number = [](int64_t n) { return std::to_string(n); };
  char times[64];
  std::snprintf(times, sizeof times, "%.1f us by the model, %.1f at memory speed", 1e6 * p.seconds,
                1e6 * p.floor_seconds);
  return "decode " + number(p.m) + "x" + number(p.rows) + "x" + number(kRowElements) + ", " +
         number(p.tiles) + " tiles of " + number(p.work.tile_n) + " columns, K in " +
         number(p.work.splits) + (p.work.splits > 1 ? " parts of a cluster" : " part") + ", " +
         number(p.shared_bytes / 1024) + " KB shared; " + times;
}

}  // namespace lora_kernels

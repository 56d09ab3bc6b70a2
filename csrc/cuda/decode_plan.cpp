#include "decode_plan.h"

#include <algorithm>
#include <cstdio>

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

// Seconds of a grid, by the model of docs/decode.md: wave by wave the longer of memory, at the rate
// that the bytes in flight give it, and of what the busiest multiprocessor loads; then the ends.
double model(const ForwardArgs& a, const Target& target, const Grid& g) {
  const bool hopper = target.compute == 90;
  const double clock = hopper ? kClock : kClockSm80;
  const double memory = (hopper ? kMemory : kMemorySm80) / clock;  // bytes a clock
  const auto ranks = double(ranks_of(a)), M = double(a.gemm.M);
  const double each = double(g.stages) * kRowBytes * (double(a.down.r) + g.tile_n + M);
  const double share = compulsory_bytes(a) / double(g.blocks());
  // Clusters leave those multiprocessors idle that no whole one fits.
  const int64_t usable = std::max(target.multiprocessors / g.splits * g.splits, 1);
  const int64_t room = usable * resident(*g.tile, target);
  const auto wave = [&](int64_t blocks) {
    const double flight = double(blocks) * (g.tile->stages - 1) * g.tile->stage_bytes;
    const double rate = std::min(1.0, flight / (kInFlight * target.multiprocessors));
    return std::max(double(blocks) * share / (memory * rate),
                    double(ceil_div(blocks, usable)) * each / kStreamBytes);
  };
  const int64_t full = g.blocks() / room, rest = g.blocks() % room;
  double clocks = double(full) * wave(room) + (rest > 0 ? wave(rest) : 0);
  clocks += double(full + (rest > 0)) * kItemClocks;
  if (g.splits > 1) {
    const double sums = (ranks + double(g.tile_n) / g.splits) * g.tile->m * 4;
    clocks += kClusterClocks + g.splits * sums / kStreamBytes;
  }
  return clocks / clock;
}

// The grid of a tile; `tiles` 0 if the tile has no room below A.
Grid grid_of(const ForwardArgs& a, const Target& target, const TileFacts& tile, int splits) {
  const int most = tile.rows - ranks_of(a);
  if (most < kUnit) return {};
  // Tiles as even as possible; one without columns makes h alone.
  const int64_t tiles = std::max<int64_t>(ceil_div(a.gemm.N, most), 1);
  const int64_t units = ceil_div(ceil_div(a.gemm.N, tiles), kUnit);
  const int tile_n = static_cast<int>(std::max<int64_t>(units, 1)) * kUnit;
  Grid g{&tile,
         tile_n,
         splits,
         std::max<int64_t>(ceil_div(a.gemm.N, tile_n), 1),
         ceil_div(ceil_div(a.gemm.K, kRowElements), splits),
         0};
  g.seconds = model(a, target, g);
  return g;
}

// Of the grids within 2 % of the fastest the one that leaves the fewest multiprocessors idle, then
// that of the fewest splits.
Grid best_grid(const ForwardArgs& a, const Target& target, const DecodeRequest& request) {
  Grid best{};
  const auto for_all = [&](const auto& f) {
    for (const TileFacts& tile : kTiles) {
      const bool fits = tile.m == (a.gemm.M <= kUnit ? kUnit : kDecodeRows);
      if (!fits || (request.rows > 0 && request.rows != tile.rows)) continue;
      for (int splits = 1; splits <= kDecodeSplits; splits *= 2) {
        const bool wanted = request.splits > 0 ? request.splits == splits
                                               : splits <= ceil_div(a.gemm.K, kRowElements);
        if (!wanted && !(splits == 1 && request.splits == 0)) continue;
        if (splits > 1 && no_sm90a(target) != nullptr) continue;  // no clusters
        const Grid g = grid_of(a, target, tile, splits);
        if (g.tiles > 0) f(g);
      }
    }
  };
  double least = 0;
  for_all([&](const Grid& g) {
    if (least == 0 || g.seconds < least) least = g.seconds;
  });
  const auto busy = [&](const Grid& g) {
    return std::min<int64_t>(g.blocks(), target.multiprocessors);
  };
  for_all([&](const Grid& g) {
    if (g.seconds > 1.02 * least) return;
    const bool better = best.tiles == 0 || busy(g) > busy(best) ||
                        (busy(g) == busy(best) && g.splits < best.splits);
    if (better) best = g;
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

#include "down_proj_plan.h"

#include <algorithm>

#include "tma_operand.h"

namespace lora_kernels {
namespace {

DownProjLayout layout_of(const DownProjArgs& a) {
  const bool mn_major = a.down.row_stride == 1 && a.down.col_stride != 1 && a.r > 1;
  return {mn_major, has_vectors(a.x, a.M),
          mn_major ? has_vectors(transposed(a.down), a.K) : has_vectors(a.down, a.r),
          a.h.col_stride == 1 && a.h.row_stride % 2 == 0 &&
              reinterpret_cast<uintptr_t>(a.h.data) % 4 == 0};
}

struct TileFacts {
  int rank, rows, depth, stages, threads, shared_bytes;
};
template <class Tile>
constexpr TileFacts facts() {
  return {Tile::kRank,   Tile::kRows,    Tile::kDepth,
          Tile::kStages, Tile::kThreads, Tile::kSharedBytes};
}
#define LK_FACTS(...) facts<DownProjSm80Tile<__VA_ARGS__>>(),
constexpr TileFacts kSm80Tiles[] = {LK_DOWN_PROJ_SM80_TILES(LK_FACTS)};
#undef LK_FACTS
#define LK_FACTS(...) facts<DownProjSm90Tile<__VA_ARGS__>>(),
constexpr TileFacts kSm90Tiles[] = {LK_DOWN_PROJ_SM90_TILES(LK_FACTS)};
#undef LK_FACTS

int64_t blocks_of(int64_t M, const TileFacts& t) { return (M + t.rows - 1) / t.rows; }

// The tile of this height whose rank holds r, or the one of the largest rank.
template <int kCount>
TileFacts tile_of(const TileFacts (&tiles)[kCount], int rows, int64_t r) {
  TileFacts best{};
  for (const TileFacts& t : tiles) {
    const bool better = best.rank < r ? t.rank > best.rank : t.rank >= r && t.rank < best.rank;
    if (t.rows == rows && (best.rank == 0 || better)) best = t;
  }
  return best;
}

// Narrow MN-major panels: only whole panels of 64 columns are used until a GPU proved others.
TileFacts sm90_tile(const DownProjArgs& a, const DownProjLayout& layout) {
  return tile_of(kSm90Tiles, 64, layout.mn_major ? std::max<int64_t>(a.r, 64) : a.r);
}

// Whether 64-row blocks keep enough of x in flight to saturate memory: bandwidth times latency,
// about 19 KB for each multiprocessor of an H100 (3 TB/s by 0.8 us). Else lower tiles, more blocks.
bool streams(const DownProjArgs& a, const TileFacts& t, int multiprocessors) {
  constexpr int64_t kInFlight = 19 << 10;
  const int64_t busy = std::min<int64_t>(blocks_of(a.M, t), multiprocessors);
  return busy * t.stages * t.rows * kRowBytes >= kInFlight * multiprocessors;
}

// nullptr if the sm_90 kernel can serve the call, else why it cannot.
const char* not_addressable(const DownProjArgs& a, const DownProjLayout& layout,
                            const Target& target) {
  const int64_t down_stride = layout.mn_major ? a.down.col_stride : a.down.row_stride;
  const int64_t down_width = layout.mn_major ? a.r : a.K, down_rows = layout.mn_major ? a.K : a.r;
  if (const char* reason = no_sm90a(target)) return reason;
  if (a.K == 0) return "K is 0: there is nothing to load";
  if (!layout.x_vectors || (a.M > 1 && a.x.row_stride < a.K))
    return "TMA cannot address x: it needs contiguous rows on 16-byte boundaries";
  if (!layout.down_vectors || (down_rows > 1 && down_stride < down_width))
    return "TMA cannot address A or B: it needs contiguous rows on 16-byte boundaries";
  if (layout.mn_major && a.dropout.seed != nullptr)
    return "dropout with a transposed A has no TMA kernel";
  if (a.M >= kTmaLimit || a.K >= kTmaLimit)
    return "a dimension is past 2^31, which TMA cannot address";
  return nullptr;
}

// nullptr if it is the best kernel too.
const char* not_sm90(const DownProjArgs& a, const DownProjLayout& layout, const Target& target) {
  if (const char* reason = not_addressable(a, layout, target)) return reason;
  if (!streams(a, sm90_tile(a, layout), target.multiprocessors))
    return "too few rows: lower tiles fill the device";
  return nullptr;
}

bool same_x(const DownProjArgs& a, const DownProjArgs& b) {
  return a.x.data == b.x.data && a.x.row_stride == b.x.row_stride &&
         a.x.col_stride == b.x.col_stride && a.x.dtype == b.x.dtype && a.M == b.M && a.K == b.K;
}

// nullptr if one launch can serve the group.
const char* not_group(const DownProjArgs* each, int count, const Target& target) {
  if (count < 1 || count > kMaxGroup) return "a launch has no place for so many projections";
  for (int i = 0; i < count; ++i) {
    const DownProjArgs& a = each[i];
    const DownProjLayout layout = layout_of(a);
    if (!same_x(a, each[0])) return "the projections do not share x";
    if ((a.dropout.seed != nullptr) != (each[0].dropout.seed != nullptr))
      return "some projections have dropout and others have none";
    if (a.r <= 0) return "a projection has no ranks";
    if (layout.mn_major) return "a transposed A has a launch of its own";
    if (a.M <= 0) continue;
    if (const char* reason = not_addressable(a, layout, target)) return reason;
  }
  return nullptr;
}

DownProjPlan plan_of(Kernel kernel, int64_t M, const TileFacts& t, int64_t rank_blocks,
                     const DownProjLayout& layout, const char* reason) {
  return {kernel,         t.rank,          t.rows,      t.depth, t.stages, t.threads,
          t.shared_bytes, blocks_of(M, t), rank_blocks, layout,  reason};
}

// Projections side by side in parts of up to `capacity` ranks, in order.
DownProjGroupPlan lay_out(const DownProjArgs* each, int count, int capacity, const char* reason) {
  DownProjGroupPlan plan{true, reason, {}, {}};
  const bool dropout = each[0].dropout.seed != nullptr;
  // `used`: columns of the part at hand, which is no part yet if there are none.
  int64_t parts = 0, used = 0, widest = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t padded = ceil_div(each[i].r, 8) * 8;
    const bool alone = dropout || padded > capacity;
    if (used > 0 && (alone || used + padded > capacity)) {
      ++parts;
      used = 0;
    }
    plan.place[i] = {parts, static_cast<int>(used), 0, layout_of(each[i]).h_pairs};
    widest = std::max(widest, used + padded);
    if (alone)
      parts += ceil_div(each[i].r, capacity);
    else
      used += padded;
  }
  if (used > 0) ++parts;
  const TileFacts t = tile_of(kSm90Tiles, 64, std::min<int64_t>(widest, capacity));
  for (int i = 0; i < count; ++i) {
    const bool shared = i + 1 < count && plan.place[i + 1].part == plan.place[i].part;
    plan.place[i].box_rows = (shared ? plan.place[i + 1].column : t.rank) - plan.place[i].column;
  }
  plan.tile = plan_of(Kernel::sm90, each[0].M, t, parts, layout_of(each[0]), reason);
  return plan;
}

}  // namespace

DownProjPlan plan_down_proj(const DownProjArgs& args, const Target& target) {
  const DownProjLayout layout = layout_of(args);
  if (args.M <= 0 || args.r <= 0)
    return {Kernel::none, 0, 0, 0, 0, 0, 0, 0, 0, layout, "h is empty"};
  const char* reason = not_sm90(args, layout, target);
  const bool sm90 = reason == nullptr;
  const bool tall = (args.M + 63) / 64 >= target.multiprocessors;
  const TileFacts t = sm90 ? sm90_tile(args, layout) : tile_of(kSm80Tiles, tall ? 64 : 16, args.r);
  return plan_of(sm90 ? Kernel::sm90 : Kernel::sm80, args.M, t, ceil_div(args.r, t.rank), layout,
                 sm90 ? "TMA and wgmma: x and down lie as TMA needs them" : reason);
}

DownProjGroupPlan plan_down_proj_group(const DownProjArgs* each, int count, const Target& target) {
  DownProjGroupPlan plan{};
  plan.reason = not_group(each, count, target);
  plan.served = plan.reason == nullptr;
  if (!plan.served) return plan;
  const bool dropout = each[0].dropout.seed != nullptr;
  plan.reason = dropout ? "x comes once from memory, and from L2 for each other mask"
                        : "x is read once for all that share a tile";
  plan.tile.reason = "h is empty";
  if (each[0].M <= 0) return plan;

  double least = 0;
  for (const int capacity : {kMaxRank, 128, 64}) {
    const DownProjGroupPlan found = lay_out(each, count, capacity, plan.reason);
    const DownProjPlan& tile = found.tile;
    const int64_t waves = ceil_div(tile.blocks * tile.rank_blocks, target.multiprocessors);
    const double bytes = double(waves) * (tile.rows + tile.rank) * kRowBytes;
    if (least == 0 || bytes < least) least = bytes, plan = found;
    if (dropout) break;  // another part would draw the mask again
  }
  return plan;
}

DownProjGroupPlan group_of_one(const DownProjPlan& plan) {
  const int box_rows = plan.layout.mn_major ? int{kRowElements} : plan.rank;
  return {true, plan.reason, plan, {{0, 0, box_rows, plan.layout.h_pairs}}};
}

std::string describe(const DownProjPlan& p) {
  if (p.kernel == Kernel::none) return p.reason;
  const auto number = [](int64_t n) { return std::to_string(n); };
  return std::string("down_proj_") + (p.kernel == Kernel::sm90 ? "sm90" : "sm80") + " " +
         number(p.rows) + "x" + number(p.rank) + "x" + number(p.depth) + ", " + number(p.stages) +
         " stages, " + number(p.blocks) + " x " + number(p.rank_blocks) + " blocks of " +
         number(p.threads) + " threads, " + number(p.shared_bytes / 1024) + " KB shared (" +
         p.reason + ")";
}

std::string describe(const DownProjGroupPlan& plan) {
  return plan.served ? describe(plan.tile) : plan.reason;
}

TensorMapSpec x_map_spec(const DownProjArgs& a, const DownProjGroupPlan& plan) {
  return tma_operand(a.x, a.M, a.K).map(nullptr, plan.tile.rows);
}

TensorMapSpec down_map_spec(const DownProjArgs& a, const DownProjGroupPlan& plan, int index) {
  const TmaOperand down = plan.tile.layout.mn_major ? tma_operand(transposed(a.down), a.K, a.r)
                                                    : tma_operand(a.down, a.r, a.K);
  return down.map(nullptr, plan.place[index].box_rows);
}

}  // namespace lora_kernels

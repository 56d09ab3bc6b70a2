// Which down_proj kernel serves a call, and its tile: host code alone, so tests need no GPU.
//
// h [M, r] = scale * dropout(x) [M, K] * down [r, K]^T reads x once: M K 2 bytes at memory speed is
// the floor, and `down`, which every block reads again, comes out of L2. docs/down_proj.md has the
// model that the choices follow; no measurement has confirmed it yet.
#pragma once
#include <string>

#include "../lora.h"
#include "descriptor.h"
#include "tensor_map.h"

namespace lora_kernels {

constexpr int kMaxRank = 256;          // of one wgmma; further ranks are other blocks
constexpr int kSharedSm80 = 99 << 10;  // what sm_86 and sm_89 allow a block
constexpr int kSharedSm90 = 227 << 10;
constexpr int kSharedAlign = 1024;  // a launch adds it to align its tiles

// ---- sm_80: cp.async and mma.sync ---------------------------------------------------------------

// One block: kRows rows of x by all kRank columns. Its warps are kWarpsM groups of 16 rows times
// kWarpsK slices of the depth, whose sums are added in order at the end.
template <int kRank_, int kRows_, int kWarpsM_, int kWarpsK_, int kDepth_, int kStages_>
struct DownProjSm80Tile {
  static constexpr int kRank = kRank_, kRows = kRows_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsK;
  static constexpr int kXBytes = kRows * kDepth * 2;
  // K-major: rows of kDepth, swizzled. MN-major: rows of kRank, padded to an odd number of chunks.
  static constexpr int kDownPitch = kRank * 2 + 16;
  static constexpr int kDownBytes =
      kRank * kDepth * 2 > kDepth* kDownPitch ? kRank * kDepth * 2 : kDepth * kDownPitch;
  static constexpr int kStageBytes = kXBytes + kDownBytes;
  static constexpr int kSumBytes = (kWarpsK - 1) * kRows * kRank * 4;
  static constexpr int kSharedBytes =
      (kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes) + kSharedAlign;
  static_assert(kRows == 16 * kWarpsM, "a warp computes 16 rows");
  static_assert(kDepth % 64 == 0, "the swizzle works on rows of 128 bytes");
  static_assert(kDepth / 16 % kWarpsK == 0, "every warp gets as many k16 steps of a stage");
  static_assert(kSharedBytes <= kSharedSm80, "sm_86 and sm_89 have 99 KB of shared memory a block");
};
//                         rank rows warps M,K depth stages
#define LK_DOWN_PROJ_SM80_TILES(X) \
  X(16, 16, 1, 4, 256, 4)          \
  X(32, 16, 1, 4, 128, 5)          \
  X(16, 64, 4, 2, 64, 6)           \
  X(64, 64, 4, 2, 64, 4)           \
  X(128, 64, 4, 2, 64, 3)

// ---- sm_90a: TMA and wgmma ----------------------------------------------------------------------

// One block: 64 rows of x by all kRank columns; two consumer warpgroups take turns at the stages
// and add their sums at the end, one warp loads.
template <int kRank_, int kStages_>
struct DownProjSm90Tile {
  static constexpr int kRank = kRank_, kStages = kStages_, kRows = 64, kConsumers = 2;
  static constexpr int kDepth = kRowElements;
  static constexpr int kThreads = 128 * kConsumers + 32;
  static constexpr int kXBytes = kRows * kRowBytes;
  static constexpr int kDownBytes = kRank * kRowBytes;  // K-major rows, or panels of 64 columns
  static constexpr int kStageBytes = kXBytes + kDownBytes;
  static constexpr int kSumBytes = kRows * kRank * 4;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + kBarrierBytes + kSharedAlign;
  static_assert(kRank % 16 == 0 && kRank <= kMaxRank, "wgmma takes an N of up to 256");
  static_assert(kXBytes % kAtomBytes == 0 && kDownBytes % kAtomBytes == 0, "tiles are whole atoms");
  static_assert(
      kStages % kConsumers == 0,
      "a stage always goes to the same warpgroup: another one, a round behind, would take "
      "the phase before for the one it waits for");
  static_assert(kSumBytes <= kStages * kStageBytes, "the sums reuse the stages");
  static_assert(kSharedBytes <= kSharedSm90, "sm_90 has 227 KB of shared memory a block");
};
#define LK_DOWN_PROJ_SM90_TILES(X) X(16, 16) X(64, 12) X(128, 8) X(256, 4)

// ---- the choice ---------------------------------------------------------------------------------

// cp.async and mma.sync, or TMA and wgmma.
enum class Kernel { none, sm80, sm90 };

// What the kernels are to run on.
struct Target {
  int compute;  // capability: 80, 86, 90 ...
  int multiprocessors;
  bool sm90a;  // whether the library holds code for it
};

// nullptr if sm_90a kernels run there, else why not.
inline const char* no_sm90a(const Target& target) {
  if (target.compute != 90) return "the device is not of compute capability 9.0";
  if (!target.sm90a) return "built without sm_90a: TORCH_CUDA_ARCH_LIST has no 9.0a";
  return nullptr;
}

// How the operands lie in memory.
struct DownProjLayout {
  bool mn_major;                 // `down` has its rank dimension contiguous
  bool x_vectors, down_vectors;  // in 16-byte pieces
  bool h_pairs;                  // h takes two columns at once
};

struct DownProjPlan {
  Kernel kernel;  // none: h is empty
  int rank, rows, depth, stages, threads, shared_bytes;
  int64_t blocks, rank_blocks;  // the grid: over rows, over ranks
  DownProjLayout layout;
  const char* reason;  // why this kernel
};

DownProjPlan plan_down_proj(const DownProjArgs& args, const Target& target);

// One line for `explain`.
std::string describe(const DownProjPlan& plan);

// ---- several projections of one x, by one launch of the sm_90a kernel ---------------------------

// Where a projection lies. A part is a tile of ranks, which blocks of all rows compute: projections
// side by side, or a slice of one of more ranks than a tile has. Under dropout each projection has
// parts of its own, since its x is masked by its own seed.
struct DownProjPlace {
  int64_t part;  // its first
  int column;    // of the tile, where its ranks begin: a multiple of 8, whole swizzle atoms
  int box_rows;  // of `down` as TMA loads it: up to the next projection, or to the tile's end
  bool h_pairs;  // as in DownProjLayout
};

struct DownProjGroupPlan {
  bool served;
  const char* reason;  // why not, or why so
  DownProjPlan tile;   // rank_blocks: the parts
  DownProjPlace place[kMaxGroup];
};

// `each`: `count` projections of ranks that are not 0. Few rows are no reason against it.
DownProjGroupPlan plan_down_proj_group(const DownProjArgs* each, int count, const Target& target);
// A single call that the sm_90a kernel serves.
DownProjGroupPlan group_of_one(const DownProjPlan& plan);
std::string describe(const DownProjGroupPlan& plan);
// What TMA loads: boxes of 64 rows of x, and of ranks or 64 k-rows of down.
TensorMapSpec x_map_spec(const DownProjArgs& args, const DownProjGroupPlan& plan);
TensorMapSpec down_map_spec(const DownProjArgs& args, const DownProjGroupPlan& plan, int index);

// The same call for `count` ranks from `first` on.
LK_SHARED_FUNCTION DownProjArgs rank_slice(const DownProjArgs& args, int64_t first, int64_t count) {
  DownProjArgs slice = args;
  slice.r = args.r - first < count ? args.r - first : count;
  slice.down.data = static_cast<uint16_t*>(args.down.data) + first * args.down.row_stride;
  slice.h.data = static_cast<uint16_t*>(args.h.data) + first * args.h.col_stride;
  return slice;
}

// Calls f(Tile{}) for the tile of a plan; false if no kernel was built for it.
template <class F>
bool with_sm80_tile(const DownProjPlan& plan, const F& f) {
#define LK_TILE(...)                                            \
  {                                                             \
    using Tile = DownProjSm80Tile<__VA_ARGS__>;                 \
    if (plan.rank == Tile::kRank && plan.rows == Tile::kRows) { \
      f(Tile{});                                                \
      return true;                                              \
    }                                                           \
  }
  LK_DOWN_PROJ_SM80_TILES(LK_TILE)
#undef LK_TILE
  return false;
}
template <class F>
bool with_sm90_tile(const DownProjPlan& plan, const F& f) {
#define LK_TILE(...)                            \
  {                                             \
    using Tile = DownProjSm90Tile<__VA_ARGS__>; \
    if (plan.rank == Tile::kRank) {             \
      f(Tile{});                                \
      return true;                              \
    }                                           \
  }
  LK_DOWN_PROJ_SM90_TILES(LK_TILE)
#undef LK_TILE
  return false;
}

}  // namespace lora_kernels

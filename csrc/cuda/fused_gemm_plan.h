// Which tile of fused_gemm serves a call, and in what order: host code alone, so tests need no GPU.
//
// y [M, N] = x [M, K] * weight [N, K]^T + h [M, r] * up [N, r]^T + bias. The floor is that of the
// frozen GEMM, 2 M N K operations; the LoRA term adds r / K of it. docs/fused_gemm.md has the model
// that the choices follow; no measurement has confirmed it yet.
#pragma once
#include <string>

#include "down_proj_plan.h"
#include "raster.h"
#include "tma_operand.h"

namespace lora_kernels {

// A cluster of two blocks computes 256 rows by kN columns of y: each block its own 128 rows, two
// consumer warpgroups of 64 each. Each block loads half of the weight's tile, for both.
template <int kN_, int kStages_, int kStaged_>
struct FusedGemmSm90Tile {
  static constexpr int kM = 128, kN = kN_, kStages = kStages_;
  static constexpr int kStaged = kStaged_;  // panels of 64 columns of y that a warpgroup can stage
  static constexpr int kConsumers = 2, kCluster = 2, kThreads = 128 * (kConsumers + 1);
  static constexpr int kPanels = kN / 64;
  static constexpr uint32_t kPanelBytes = kRowElements * kRowBytes;  // 64 rows, or 64 k-rows
  static constexpr uint32_t kABytes = kM * kRowBytes, kBBytes = kN * kRowBytes;
  static constexpr uint32_t kStageBytes = kABytes + kBBytes;
  static constexpr uint32_t kStagingBytes = kConsumers * kStaged * kPanelBytes;
  static constexpr uint32_t kBiasBytes = kConsumers * kN * 2;
  static constexpr uint32_t kControlBytes = kStages * (8 + 8 + 4) + 48;  // barriers, item numbers
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kStagingBytes + kBiasBytes + kControlBytes + kSharedAlign;
  static_assert(kN % 64 == 0 && kN <= 256, "wgmma takes an N of up to 256, y goes in panels of 64");
  static_assert(kBBytes / 2 % kAtomBytes == 0, "each block loads whole atoms of the weight's tile");
  static_assert(kPanels % kStaged == 0, "the next tile begins with the first panel's place again");
  static_assert(kSharedBytes <= kSharedSm90, "sm_90 has 227 KB of shared memory a block");
};
//                          columns, stages, staged panels
#define LK_FUSED_GEMM_SM90_TILES(X) X(256, 4, 2) X(192, 4, 3) X(128, 6, 2)

constexpr int kClusterRows = 256;  // of y: those of both blocks

// ---- sm_80: cp.async and mma.sync ---------------------------------------------------------------

constexpr int kSm80Depth = 32;  // of a stage

// A block computes kM rows by kN columns of y, its warps kWarpsM by kWarpsN parts of that.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct FusedGemmSm80Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor, for which registers suffice
  static constexpr int kWarpRows = kM / kWarpsM, kWarpColumns = kN / kWarpsN;
  static constexpr int kABytes = kM * kSm80Depth * 2, kBBytes = kN * kSm80Depth * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kTileBytes = kM * (kN * 2 + 16);  // y on its way out
  static constexpr int kSharedBytes = kStages * kStageBytes + kSharedAlign;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0, "parts are whole fragments");
  static_assert(kN % 64 == 0, "the swizzle works on rows of 128 bytes");
  static_assert(kTileBytes <= kStages * kStageBytes, "y reuses the stages");
  static_assert(kSharedBytes <= kSharedSm80, "sm_86 and sm_89 have 99 KB of shared memory a block");
};
//                          rows, columns, warps M, N, stages, blocks
#define LK_FUSED_GEMM_SM80_TILES(X) \
  X(128, 256, 2, 4, 4, 1) X(128, 128, 2, 2, 4, 2) X(64, 64, 2, 2, 6, 3)

// ---- the choice ---------------------------------------------------------------------------------

// What a plan chooses by itself where this says 0. For tuning.
struct FusedGemmRequest {
  int tile_n = 0, group = 0;
  bool mn_major = false;         // take the weight so, if need be by a copy
  Kernel kernel = Kernel::none;  // or sm80
};

struct FusedGemmPlan {
  bool served;  // else `reason` says why not
  bool empty;   // y has no elements
  Kernel kernel;
  const char* reason;  // of the kernel, if served
  int tile_m, tile_n, stages, threads, shared_bytes;
  bool mn_major;  // weight and up have N contiguous
  bool masked;    // dropout's mask on the LoRA term

  bool y_vectors;               // y is stored by TMA, or in 16-byte pieces
  TmaOperand x, weight, h, up;  // weight and up transposed if mn_major; their offsets still 0
  TmaOperand bias;              // a row; not by TMA, but contiguous too
  int64_t r;                    // 0 where the LoRA term has no part in y
  Raster raster;                // over the tiles of y; of sm_80 its pairs are single row blocks
  unsigned clusters;            // of sm_80 the blocks that multiprocessors take at a time
};

FusedGemmPlan plan_fused_gemm(const FusedGemmArgs& args, const Target& target,
                              const FusedGemmRequest& request = {});

// Products of one launch, of as many rows: an output each, or all added up in that of the first.
struct FusedGemmGroup {
  FusedGemmArgs args[kMaxGroup];
  FusedGemmPlan plans[kMaxGroup];  // their tiles and majors are the same
  int count;
  bool added;
  Raster raster;
  unsigned clusters;

  int outputs() const { return added ? 1 : count; }
  bool masked() const {
    for (int i = 0; i < count; ++i)
      if (plans[i].masked) return true;
    return false;
  }
  // A mask that keeps everything.
  Dropout mask_of_none() const {
    for (int i = 0; i < count; ++i)
      if (plans[i].masked) return {args[i].dropout.seed, args[i].dropout.seed_len, 0};
    return {nullptr, 0, 0};
  }
};

// None of `args` is empty. nullptr, or why the kernel does not serve them.
const char* plan_fused_gemm_group(const FusedGemmArgs* args, int count, bool added,
                                  const Target& target, const FusedGemmRequest& request,
                                  FusedGemmGroup* group);
inline FusedGemmGroup group_of(const FusedGemmArgs& args, const FusedGemmPlan& plan) {
  return {{args}, {plan}, 1, false, plan.raster, plan.clusters};
}
std::string describe(const FusedGemmGroup& group);

// Gives every packed operand its place; the bytes of all.
int64_t place_packed(FusedGemmPlan& plan);

// As many as the device holds, a cluster of two blocks being two multiprocessors.
inline unsigned clusters_of(const Target& target, int64_t items) {
  const int64_t room = target.multiprocessors > 1 ? target.multiprocessors / 2 : 1;
  return static_cast<unsigned>(items < room ? items : room);
}

// One line for `explain`: of the plan alone, or in a grid that does more.
std::string describe(const FusedGemmPlan& plan);
std::string describe(const FusedGemmPlan& plan, const Raster& raster, unsigned clusters);

// Clocks of one cluster for a tile of so many k16 steps, by the model of docs/fused_gemm.md.
double tile_cycles(int tile_n, int64_t steps);
// Of one multiprocessor for a tile of the sm_80 kernel.
double sm80_tile_cycles(int tile_n, int64_t steps);
// Of the frozen GEMM alone, in the plan's tiles.
double gemm_cycles(const FusedGemmPlan& plan, int64_t K);

// Rows of a box: of x and h all 128 of a block; of a K-major weight one block's half of the tile's
// rows, of an MN-major one half of its k-rows.
inline int b_box_rows(const FusedGemmPlan& plan) {
  return plan.mn_major ? static_cast<int>(kRowElements) / 2 : plan.tile_n / 2;
}

// Calls f(Tile{}) for the tile of a plan; false if no kernel was built for it.
template <class F>
bool with_fused_gemm_sm80_tile(int tile_n, const F& f) {
#define LK_TILE(...)                             \
  {                                              \
    using Tile = FusedGemmSm80Tile<__VA_ARGS__>; \
    if (tile_n == Tile::kN) {                    \
      f(Tile{});                                 \
      return true;                               \
    }                                            \
  }
  LK_FUSED_GEMM_SM80_TILES(LK_TILE)
#undef LK_TILE
  return false;
}
template <class F>
bool with_fused_gemm_tile(int tile_n, const F& f) {
#define LK_TILE(...)                             \
  {                                              \
    using Tile = FusedGemmSm90Tile<__VA_ARGS__>; \
    if (tile_n == Tile::kN) {                    \
      f(Tile{});                                 \
      return true;                               \
    }                                            \
  }
  LK_FUSED_GEMM_SM90_TILES(LK_TILE)
#undef LK_TILE
  return false;
}

}  // namespace lora_kernels

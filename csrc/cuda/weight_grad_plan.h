// How weight_grad goes through its matrix: host code alone, so tests need no GPU.
//
// grad [r, K] = scale * h [M, r]^T dropout(x) [M, K], and from the same read of x, where asked, a
// down projection and the sums of columns: what backward needs of dy. Reading x is the floor, M K 2
// bytes at memory speed. docs/backward.md has the model that the choices follow; no measurement has
// confirmed it yet.
//
// Projections that share x share a pass too, each with its own gradient, scale and mask.
#pragma once
#include <string>
#include <type_traits>

#include "down_proj_plan.h"
#include "reduce.h"
#include "tma_operand.h"

namespace lora_kernels {

// One projection of a pass that several share: its dh lies at columns [first, first + ranks) of h.
struct GradPart {
  int64_t first, ranks;  // first: a multiple of 8
  Matrix grad;           // [ranks, K]
  float scale;
  Dropout dropout;
};

struct WeightGradPass {
  WeightGradArgs grad;  // with parts: h, x and sizes alone, r with the columns between parts
  DownProjArgs down;    // of the same x, without dropout
  Matrix sums;          // [1, K]
  bool with_grad, with_down, with_sums;
  GradPart parts[kMaxGroup];
  int part_count = 0;  // 0: one gradient, as `grad` says

  bool masked() const {
    for (int p = 0; p < part_count; ++p)
      if (parts[p].dropout.seed != nullptr) return true;
    return part_count == 0 && grad.dropout.seed != nullptr;
  }
};

// A chunk of kSubs * 128 rows stays with its block, and so do its rows of h, 64 KB; columns of x go
// by, 64 at a time, in stages of 128 rows. Two consumer warpgroups take 64 rows of a stage each for
// the down projection, and take turns at the columns for the gradient.
template <int kRank_, int kSubs_, int kStages_>
struct WeightGradSm90Tile {
  static constexpr int kRank = kRank_, kSubs = kSubs_, kStages = kStages_;
  static constexpr int kStageRows = 128, kRows = kSubs * kStageRows, kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr uint32_t kXBytes = kStageRows * kRowBytes;
  static constexpr uint32_t kPanelBytes = kRowElements * kRowBytes;  // of down: 64 columns of x
  static constexpr uint32_t kDownBytes = kRank / 64 * kPanelBytes;
  static constexpr uint32_t kStageBytes = kXBytes + kDownBytes;
  static constexpr uint32_t kHPanelBytes = kRows * kRowBytes;
  static constexpr uint32_t kHBytes = kRank / 64 * kHPanelBytes;
  static constexpr uint32_t kOnesBytes = 16 * kRowBytes;
  static constexpr uint32_t kBarrierBytes = (2 * kStages + 1) * 8;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kHBytes + kOnesBytes + kBarrierBytes + kSharedAlign;
  static_assert(kRank % 64 == 0 && kRank <= kMaxRank, "h and down come in panels of 64 ranks");
  static_assert(kSubs * kRank <= 256, "sums of the down projection: 128 registers a thread");
  static_assert(kSharedBytes <= kSharedSm90, "sm_90 has 227 KB of shared memory a block");
};
//                            ranks, stages of a chunk, in the ring
#define LK_WEIGHT_GRAD_SM90_TILES(X) X(64, 4, 6) X(128, 2, 4) X(256, 1, 3)

// The kernel of every other GPU, and of sizes past TMA. A block keeps the gradient of kColumns
// columns of x by kRank ranks in registers, 16 columns a warp; stages of kDepth rows go by.
constexpr int kSm80GradColumns = 128, kSm80GradRows = 64;
template <int kRank_, int kStages_>
struct WeightGradSm80Tile {
  static constexpr int kRank = kRank_, kStages = kStages_;
  static constexpr int kColumns = kSm80GradColumns, kDepth = kSm80GradRows, kThreads = 2 * kColumns;
  static constexpr int kXBytes = kDepth * kColumns * 2, kHBytes = kDepth * kRank * 2;
  static constexpr int kStageBytes = kXBytes + kHBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kSharedAlign;
  static_assert(kRank % 16 == 0 && kRank <= 128, "64 registers a thread for the gradient");
  static_assert(kStages >= 2, "a stage is loaded while another is multiplied");
  static_assert(kSharedBytes <= kSharedSm80, "sm_86 and sm_89 have 99 KB of shared memory a block");
};
//                            ranks, stages
#define LK_WEIGHT_GRAD_SM80_TILES(X) X(16, 4) X(64, 3) X(128, 3)

constexpr int64_t kSumsPitch = 4;  // the sum of a column, four times

struct WeightGradPlan {
  Kernel kernel;
  bool makes_down;  // whether it is this kernel that makes the down projection of the pass
  bool served;      // else `reason` says why not
  const char* reason;
  bool empty;  // there is nothing to read: results are zeros
  int rank, threads, shared_bytes;
  int64_t rows, chunks, splits, tiles;  // of a chunk; of M, of K; blocks of 64 columns of a split
  int64_t rank_blocks;                  // sm80: of all parts, if they have masks
  int64_t pitch;                        // ranks of a row of a partial result
  int masks;      // of a stage of x, which is loaded again for each; 0 without dropout
  double cycles;  // by the model

  TmaOperand x, h, down;                          // down as [K, r]; their offsets still 0
  int64_t grad_offset, sums_offset, down_offset;  // partial results in the workspace
};

WeightGradPlan plan_weight_grad(const WeightGradPass& pass, const Target& target);
// Gives partial results their places in the workspace, from `offset` on; where they end.
int64_t place_partials(const WeightGradPass& pass, WeightGradPlan& plan, int64_t offset);
// Likewise for a call of weight_grad alone, operands included: bytes of its workspace.
int64_t place_weight_grad(const WeightGradPass& pass, WeightGradPlan& plan);
// What is left of a pass: sums of partial results, in order. `part`: the number of one of several.
ReduceJob grad_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace);
ReduceJob grad_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                   int part);
ReduceJob sums_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace);
ReduceJob down_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace);
// Of every gradient of a pass.
void add_grad_jobs(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                   ReduceJobs& jobs);

// One line for `explain`.
std::string describe(const WeightGradPlan& plan);

// What the kernel is told.
struct WeightGradWork {
  float *grad, *sums, *down;  // partial results; nullptr: not asked for
  int64_t M, K;
  uint32_t r, pitch;
  uint32_t tiles, tiles_of_split;  // of 64 columns
  uint32_t splits;
};
WeightGradWork work_of(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace);

// And where x may be masked. A type of its own: with parameters that much longer ptxas spills in
// the kernel of 256 ranks with a down projection.
struct MaskedPart {
  uint32_t first, end;  // ranks
  Dropout dropout;
};
struct MaskedGradWork : WeightGradWork {
  uint32_t part_count;
  MaskedPart parts[kMaxGroup];
};
MaskedGradWork masked_work_of(const WeightGradPass& pass, const WeightGradPlan& plan,
                              void* workspace);
template <bool kDown>
using WorkOf = std::conditional_t<kDown, WeightGradWork, MaskedGradWork>;

// What the sm_80 kernel is told. A part with a mask has blocks of ranks of its own.
struct WeightGradSm80Part {
  int64_t first, ranks;
  uint32_t first_block;
  Dropout dropout;
};
struct WeightGradSm80Work {
  float *grad, *sums;  // partial results; nullptr: not asked for
  Matrix x, h;
  bool x_vectors, h_vectors;  // in 16-byte pieces
  int64_t M, K, pitch, rows;
  uint32_t blocks;  // of ranks, of the same columns of x
  uint32_t part_count;
  WeightGradSm80Part parts[kMaxGroup];
};
WeightGradSm80Work sm80_work_of(const WeightGradPass& pass, const WeightGradPlan& plan,
                                void* workspace);

// TMA's view of the operands, in the order of the kernel's parameters.
struct WeightGradMaps {
  TensorMapSpec x, h, down;
};
WeightGradMaps maps_of(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace);

// Calls f(Tile{}) for the tile of a plan; false if no kernel was built for it.
template <class F>
bool with_weight_grad_tile(int rank, const F& f) {
#define LK_TILE(...)                              \
  {                                               \
    using Tile = WeightGradSm90Tile<__VA_ARGS__>; \
    if (rank == Tile::kRank) {                    \
      f(Tile{});                                  \
      return true;                                \
    }                                             \
  }
  LK_WEIGHT_GRAD_SM90_TILES(LK_TILE)
#undef LK_TILE
  return false;
}
template <class F>
bool with_weight_grad_sm80_tile(int rank, const F& f) {
#define LK_TILE(...)                              \
  {                                               \
    using Tile = WeightGradSm80Tile<__VA_ARGS__>; \
    if (rank == Tile::kRank) {                    \
      f(Tile{});                                  \
      return true;                                \
    }                                             \
  }
  LK_WEIGHT_GRAD_SM80_TILES(LK_TILE)
#undef LK_TILE
  return false;
}

}  // namespace lora_kernels

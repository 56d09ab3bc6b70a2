// Whether one launch serves a forward call of a few rows, and its grid: host code alone, so tests
// need no GPU.
//
// Up to 64 rows of x are little beside W, whose N K 2 bytes at memory speed are the floor. A block
// makes tile_n columns of y from their rows of W, and beside them the h that they need from all of
// A, which comes out of L2: r / tile_n of the bytes of W. Where that leaves multiprocessors idle,
// the blocks of a cluster split K. docs/decode.md has the model that the choices follow; no
// measurement has confirmed it yet.
#pragma once
#include <string>

#include "down_proj_plan.h"
#include "tma_operand.h"

namespace lora_kernels {

constexpr int kDecodeRows = 64;       // of x, at most
constexpr int kDecodeRank = 128;      // at most
constexpr int kDecodeSplits = 8;      // of K, at most: the blocks of a portable cluster
constexpr int kUnit = 16;             // rows of one mma
constexpr int kReservedBytes = 1024;  // of shared memory, by the system, for each block

// kRows rows of A and of W below them by kM rows of x, in stages of 64 of the depth. The warps are
// kWarpsN groups of 16-row units times kWarpsK slices of the depth, whose sums are added in order.
// kResident blocks share a multiprocessor.
template <int kM_, int kRows_, int kStages_, int kResident_>
struct DecodeTile {
  static constexpr int kM = kM_, kRows = kRows_, kStages = kStages_, kResident = kResident_;
  static constexpr int kWarpsN = 4, kWarpsK = 2, kWarps = kWarpsN * kWarpsK;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnits = kRows / kUnit / kWarpsN;  // of a warp
  static constexpr int kBlocks = kM / 8;                  // columns of an mma's result
  static constexpr int kSteps = int{kRowElements / kMmaDepth} / kWarpsK;
  static constexpr int kStackBytes = kRows * int{kRowBytes}, kXBytes = kM * int{kRowBytes};
  static constexpr int kStageBytes = kStackBytes + kXBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes + kSharedAlign;
  // The sums and h take the place of all stages but the last; B and the bias that of the last.
  static constexpr int kSumBytes = kRows * kM * 4;
  static constexpr int kMostRanks = kRows - kUnit < kDecodeRank ? kRows - kUnit : kDecodeRank;
  static constexpr int kHBytes = kMostRanks * kM * 2;
  static constexpr int kBiasBytes = kRows * 4;
  static constexpr int kHalf = kRows / 2;
  static_assert(kRows % (kUnit * kWarpsN) == 0, "warps have as many units");
  static_assert(kM % kUnit == 0 && kM <= kDecodeRows, "x comes in 16-row fragments");
  static_assert(kSumBytes + kHBytes <= kRingBytes - kStageBytes, "sums and h reuse the ring");
  static_assert(kHalf * (2 * kHalf + 16) + kBiasBytes <= kStageBytes,
                "B, of at most so many bytes at kHalf columns and ranks, and the bias fit a stage");
  static_assert(kSharedBytes <= kSharedSm80, "sm_86 and sm_89 have 99 KB of shared memory a block");
};
//         rows of x, of A and W, stages, resident
#define LK_DECODE_TILES(X) X(16, 64, 8, 2) X(16, 192, 3, 2) X(64, 64, 5, 2) X(64, 192, 3, 1)

// What the plan chooses by itself where this says 0.
struct DecodeRequest {
  int rows = 0, tile_n = 0, splits = 0;
};

// What the kernel is told.
struct DecodeWork {
  int tile_n;                  // columns of a block, a multiple of 16
  int ranks;                   // rows of A with zeros up to a multiple of 16
  int splits;                  // of K, over the blocks of a cluster
  int64_t stages;              // that a block takes
  bool x_vectors, up_vectors;  // rows of x, of B in 16-byte pieces
};

struct DecodePlan {
  bool served;  // else `reason` says why not
  bool empty;   // neither y nor h has elements
  const char* reason;
  int m, rows, threads, shared_bytes;  // of the tile
  DecodeWork work;
  int64_t tiles;         // the grid: times splits
  int64_t loaded_bytes;  // by all blocks, from L2 too
  double seconds;        // by the model
  double floor_seconds;  // of every operand and result once at memory speed, by the model
};

DecodePlan plan_decode(const ForwardArgs& args, const Target& target,
                       const DecodeRequest& request = {});
std::string describe(const DecodePlan& plan);

// Calls f(Tile{}) for the tile of a plan; false if no kernel was built for it.
template <class F>
bool with_decode_tile(const DecodePlan& plan, const F& f) {
#define LK_TILE(...)                                      \
  {                                                       \
    using Tile = DecodeTile<__VA_ARGS__>;                 \
    if (plan.m == Tile::kM && plan.rows == Tile::kRows) { \
      f(Tile{});                                          \
      return true;                                        \
    }                                                     \
  }
  LK_DECODE_TILES(LK_TILE)
#undef LK_TILE
  return false;
}

}  // namespace lora_kernels

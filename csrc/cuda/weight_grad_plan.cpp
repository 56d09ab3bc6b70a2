#include "weight_grad_plan.h"

#include <algorithm>

#include "model.h"

namespace lora_kernels {
namespace {

struct TileFacts {
  int rank, subs, rows, threads, shared_bytes;
};
#define LK_FACTS(...)                                                                 \
  {WeightGradSm90Tile<__VA_ARGS__>::kRank, WeightGradSm90Tile<__VA_ARGS__>::kSubs,    \
   WeightGradSm90Tile<__VA_ARGS__>::kRows, WeightGradSm90Tile<__VA_ARGS__>::kThreads, \
   WeightGradSm90Tile<__VA_ARGS__>::kSharedBytes},
constexpr TileFacts kTiles[] = {LK_WEIGHT_GRAD_SM90_TILES(LK_FACTS)};
#undef LK_FACTS

// The rows of a chunk depend on the rank alone, so that the order of sums does.
const TileFacts& tile_of(int64_t r) {
  for (const TileFacts& t : kTiles)
    if (t.rank >= r) return t;
  return kTiles[std::size(kTiles) - 1];
}

// reduce.cuh counts a matrix, in fours, by 32 bits and steps on by less than this many.
bool too_many(int64_t rows, int64_t pitch) {
  return rows * pitch / 4 >= (int64_t{1} << 32) - (1 << 24);
}

// nullptr if the sm_90a kernel serves the pass, else why not.
const char* not_sm90(const WeightGradArgs& a, const Target& target) {
  constexpr int64_t kMargin = 1024;  // a chunk may reach past the last row
  if (const char* reason = no_sm90a(target)) return reason;
  if (std::max({a.M, a.K, a.r}) >= kTmaLimit - kMargin)
    return "a dimension is past 2^31, which TMA cannot address";
  if (too_many(std::max(a.M, a.K), reduce_pitch(a.r)))
    return "a gradient has more than 2^34 elements";
  return nullptr;
}

// Likewise the sm_80 kernel, which makes no down projection.
const char* not_sm80(const WeightGradPass& pass, const Target& target) {
  if (target.compute < 80) return "the device is older than compute capability 8.0";
  const int64_t pitch = pass.with_grad ? reduce_pitch(pass.grad.r) : 0;
  if (too_many(pass.grad.K, std::max(pitch, pass.with_sums ? kSumsPitch : 0)))
    return "a gradient has more than 2^34 elements";
  return nullptr;
}

// How often a block masks a stage of x: once for each part that it has ranks of.
int64_t masks_of_block(const WeightGradPass& pass, int64_t first, int64_t ranks) {
  int64_t masks = 0;
  for (int p = 0; p < pass.part_count; ++p) {
    const GradPart& part = pass.parts[p];
    masks += std::max(part.first, first) < std::min(part.first + part.ranks, first + ranks);
  }
  return masks;
}

// How often the busiest block takes a stage.
int64_t turns_of_stage(const WeightGradPass& pass, int64_t ranks, int64_t rank_blocks) {
  int64_t most = 1;
  for (int64_t b = 0; pass.masked() && b < rank_blocks; ++b)
    most = std::max(most, masks_of_block(pass, b * ranks, ranks));
  return most;
}

// Clocks of the pass, if x is split so many times along K.
double pass_cycles(const WeightGradPass& pass, const TileFacts& t, int64_t chunks, int64_t tiles,
                   int64_t rank_blocks, int64_t splits, int multiprocessors) {
  const int64_t blocks = chunks * splits * rank_blocks;
  const auto busy = static_cast<double>(std::min<int64_t>(blocks, multiprocessors));
  const double bytes = 128 * kRowBytes, down = pass.with_down ? t.rank * kRowBytes : 0;
  // Bytes that wgmma reads of shared memory, 128 a clock, for dh and for the gradient; its clocks.
  const int products = 1 + pass.with_down;
  const double port = (products * 8 * (2048 + t.rank * 32.0) + bytes + down) / 128;
  const double tensor = products * 8 * t.rank / 2.0;
  const double mask = pass.masked() ? kDropoutClocks : 0;
  // Loads after the first of a stage are of L2.
  const auto again = static_cast<double>(turns_of_stage(pass, t.rank, rank_blocks));
  const double stage = std::max({again * (bytes + down) / kStreamBytes, memory_clocks(bytes * busy),
                                 again * (std::max(port, tensor) + mask)});
  const double h = t.rows * t.rank * 2 / kStreamBytes;
  const auto turns = static_cast<double>(ceil_div(tiles, splits) * t.subs);
  // Partial results, written and read.
  const int64_t grads = pass.with_grad ? chunks * pass.grad.K : 0;
  const int64_t sums = pass.with_down ? splits * pass.grad.M : 0;
  const double partials =
      2.0 * 4.0 * static_cast<double>((grads + sums) * reduce_pitch(pass.grad.r));
  return static_cast<double>(ceil_div(blocks, multiprocessors)) *
             (turns * stage + h + kItemClocks) +
         memory_clocks(partials);
}

void choose_splits(const WeightGradPass& pass, const TileFacts& t, const Target& target,
                   WeightGradPlan& plan) {
  constexpr int64_t kMost = 64;
  const int64_t tiles = ceil_div(pass.grad.K, kRowElements);
  for (int64_t splits = 1; splits <= std::min(tiles, kMost); ++splits) {
    const double cycles =
        pass_cycles(pass, t, plan.chunks, tiles, plan.rank_blocks, splits, target.multiprocessors);
    if (splits > 1 && cycles >= plan.cycles) continue;
    plan.cycles = cycles;
    plan.tiles = ceil_div(tiles, splits);
  }
  plan.splits = ceil_div(tiles, plan.tiles);
}

// ---- sm_80 --------------------------------------------------------------------------------------

// Parts with masks have blocks of ranks of their own; without masks one stands for all.
int parts_of(const WeightGradPass& pass, WeightGradSm80Part (&parts)[kMaxGroup]) {
  if (!pass.masked() || pass.part_count == 0) {
    parts[0] = {0, pass.with_grad ? pass.grad.r : 0, 0, pass.grad.dropout};
    return 1;
  }
  int count = 0;
  for (int p = 0; p < pass.part_count; ++p)
    if (const GradPart& part = pass.parts[p]; part.ranks > 0)
      parts[count++] = {part.first, part.ranks, 0, part.dropout};
  if (count == 0) parts[count++] = {};
  return count;
}

// Gives parts their first blocks of so many ranks; the number of all blocks.
int64_t number_blocks(WeightGradSm80Part* parts, int count, int rank) {
  int64_t blocks = 0;
  for (int p = 0; p < count; ++p) {
    parts[p].first_block = static_cast<uint32_t>(blocks);
    blocks += std::max<int64_t>(1, ceil_div(parts[p].ranks, rank));
  }
  return blocks;
}

// Floats of a column of a partial result.
int64_t floats_of(const WeightGradPass& pass, const WeightGradPlan& plan) {
  return (pass.with_grad ? plan.pitch : 0) + (pass.with_sums ? kSumsPitch : 0);
}

// Up to two blocks a multiprocessor, so that one wave is enough, and partial results of at most a
// quarter of the bytes of x: a column has 2 M bytes, its results 4 floats bytes a chunk.
int64_t rows_of_chunk(const WeightGradPass& pass, const WeightGradPlan& plan, int multiprocessors) {
  constexpr int64_t kBlocks = 2, kMostChunks = 65535;
  const int64_t M = pass.grad.M;
  const int64_t to_fill = kBlocks * multiprocessors / (plan.splits * plan.rank_blocks);
  const int64_t small = M / (8 * std::max<int64_t>(1, floats_of(pass, plan)));
  const int64_t chunks = std::clamp<int64_t>(std::min(to_fill, small), 1, kMostChunks);
  return ceil_div(ceil_div(M, chunks), kSm80GradRows) * kSm80GradRows;
}

// Clocks of the pass: x at memory speed or the busiest multiprocessor's loads and masks, then
// partial results, written and read.
double sm80_cycles(const WeightGradPass& pass, const WeightGradPlan& plan, int multiprocessors) {
  const double stage_bytes = kSm80GradRows * (kSm80GradColumns + plan.rank) * 2.0;
  const double stage =
      std::max(stage_bytes / kStreamBytes, pass.masked() ? double{kDropoutClocks} : 0);
  const int64_t turns = ceil_div(plan.chunks * plan.splits * plan.rank_blocks, multiprocessors) *
                        (plan.rows / kSm80GradRows);
  const double partials =
      2.0 * 4.0 * static_cast<double>(plan.chunks * pass.grad.K * floats_of(pass, plan));
  const double x = memory_clocks(static_cast<double>(pass.grad.M * pass.grad.K) * 2);
  return std::max(x, static_cast<double>(turns) * stage) + kItemClocks + memory_clocks(partials);
}

// Of the tile that holds so many, or of the largest.
int sm80_rank(int64_t r) {
  int rank = 0;
#define LK_RANK(...) \
  if (rank == 0 || rank < r) rank = WeightGradSm80Tile<__VA_ARGS__>::kRank;
  LK_WEIGHT_GRAD_SM80_TILES(LK_RANK)
#undef LK_RANK
  return rank;
}

void plan_sm80(const WeightGradPass& pass, const Target& target, WeightGradPlan& plan) {
  const WeightGradArgs& a = pass.grad;
  WeightGradSm80Part parts[kMaxGroup];
  const int count = parts_of(pass, parts);
  int64_t most = 0;
  for (int p = 0; p < count; ++p) most = std::max(most, parts[p].ranks);
  with_weight_grad_sm80_tile(sm80_rank(most), [&](auto tile) {
    using Tile = decltype(tile);
    plan.rank = Tile::kRank;
    plan.threads = Tile::kThreads;
    plan.shared_bytes = Tile::kSharedBytes;
  });
  plan.tiles = kSm80GradColumns / kRowElements;
  plan.splits = ceil_div(a.K, kSm80GradColumns);
  plan.rank_blocks = number_blocks(parts, count, plan.rank);
  plan.rows = rows_of_chunk(pass, plan, target.multiprocessors);
  plan.chunks = ceil_div(a.M, plan.rows);
  plan.cycles = sm80_cycles(pass, plan, target.multiprocessors);
  plan.x = {a.x, a.M, a.K, false, 0};  // as they lie
  plan.h = {a.h, a.M, a.r, false, 0};
}

}  // namespace

WeightGradPlan plan_weight_grad(const WeightGradPass& pass, const Target& target) {
  const WeightGradArgs& a = pass.grad;
  WeightGradPlan plan{};
  plan.reason = not_sm90(a, target);
  const bool sm90 = plan.reason == nullptr;
  const char* refused = sm90 ? nullptr : not_sm80(pass, target);
  if (refused != nullptr) plan.reason = refused;
  plan.served = refused == nullptr;
  plan.kernel = sm90 ? Kernel::sm90 : plan.served ? Kernel::sm80 : Kernel::none;
  plan.makes_down = sm90 && pass.with_down;
  plan.empty = a.M == 0 || a.K == 0;
  plan.pitch = reduce_pitch(a.r);
  plan.masks = pass.masked() ? std::max(1, pass.part_count) : 0;
  if (!plan.served || plan.empty) return plan;
  if (!sm90) {
    plan_sm80(pass, target, plan);
    return plan;
  }
  plan.reason = "TMA and wgmma";
  const int64_t r = pass.with_grad ? a.r : 0;  // sums alone need no ranks
  const TileFacts& t = tile_of(r);
  plan.rank = t.rank;
  plan.rows = t.rows;
  plan.threads = t.threads;
  plan.shared_bytes = t.shared_bytes;
  plan.chunks = ceil_div(a.M, t.rows);
  plan.rank_blocks = std::max<int64_t>(1, ceil_div(r, t.rank));
  choose_splits(pass, t, target, plan);
  plan.x = tma_operand(a.x, a.M, a.K);
  if (pass.with_grad) plan.h = tma_operand(a.h, a.M, a.r);
  if (plan.makes_down) plan.down = tma_operand(transposed(pass.down.down), a.K, a.r);
  return plan;
}

int64_t place_partials(const WeightGradPass& pass, WeightGradPlan& plan, int64_t offset) {
  const auto reserve = [&](bool wanted, int64_t floats) {
    const int64_t at = offset;
    if (wanted) offset += ceil_div(floats * 4, 128) * 128;
    return at;
  };
  const WeightGradArgs& a = pass.grad;
  plan.grad_offset = reserve(pass.with_grad, plan.chunks * a.K * plan.pitch);
  plan.sums_offset = reserve(pass.with_sums, plan.chunks * a.K * kSumsPitch);
  plan.down_offset = reserve(plan.makes_down, plan.splits * a.M * plan.pitch);
  return offset;
}

int64_t place_weight_grad(const WeightGradPass& pass, WeightGradPlan& plan) {
  plan.h.offset = plan.x.bytes();
  return place_partials(pass, plan, plan.h.offset + plan.h.bytes());
}

namespace {

float* floats_at(void* workspace, int64_t offset) {
  return reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + offset);
}

}  // namespace

ReduceJob grad_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
  const WeightGradArgs& a = pass.grad;
  return {floats_at(workspace, plan.grad_offset),
          plan.chunks,
          a.K,
          a.r,
          plan.pitch,
          transposed(a.grad),
          a.scale};
}

ReduceJob grad_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                   int part) {
  const GradPart& p = pass.parts[part];
  ReduceJob job = grad_job(pass, plan, workspace);
  job.partials += p.first;
  job.columns = p.ranks;
  job.to = transposed(p.grad);
  job.scale = p.scale;
  return job;
}

void add_grad_jobs(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                   ReduceJobs& jobs) {
  if (pass.part_count == 0) jobs.add(grad_job(pass, plan, workspace));
  for (int p = 0; p < pass.part_count; ++p) jobs.add(grad_job(pass, plan, workspace, p));
}

ReduceJob sums_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
  return {floats_at(workspace, plan.sums_offset),
          plan.chunks,
          pass.grad.K,
          1,
          kSumsPitch,
          transposed(pass.sums),
          1.0f};
}

ReduceJob down_job(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
  const DownProjArgs& a = pass.down;
  return {floats_at(workspace, plan.down_offset), plan.splits, a.M, a.r, plan.pitch, a.h, a.scale};
}

WeightGradWork work_of(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
  const WeightGradArgs& a = pass.grad;
  const auto at = [&](bool wanted, int64_t offset) {
    return wanted ? floats_at(workspace, offset) : nullptr;
  };
  return {at(pass.with_grad, plan.grad_offset),
          at(pass.with_sums, plan.sums_offset),
          at(plan.makes_down, plan.down_offset),
          a.M,
          a.K,
          static_cast<uint32_t>(a.r),
          static_cast<uint32_t>(plan.pitch),
          static_cast<uint32_t>(ceil_div(a.K, kRowElements)),
          static_cast<uint32_t>(plan.tiles),
          static_cast<uint32_t>(plan.splits)};
}

MaskedGradWork masked_work_of(const WeightGradPass& pass, const WeightGradPlan& plan,
                              void* workspace) {
  MaskedGradWork work{
      work_of(pass, plan, workspace), static_cast<uint32_t>(std::max(1, plan.masks)), {}};
  work.parts[0] = {0, work.r, pass.grad.dropout};
  if (!pass.masked()) return work;
  Dropout keeps{};
  for (int p = 0; p < pass.part_count; ++p)
    if (pass.parts[p].dropout.seed != nullptr) keeps = pass.parts[p].dropout;
  keeps.threshold = 0;  // a part without dropout is masked too, and loses nothing
  for (int p = 0; p < pass.part_count; ++p) {
    const GradPart& part = pass.parts[p];
    work.parts[p] = {static_cast<uint32_t>(part.first),
                     static_cast<uint32_t>(part.first + part.ranks),
                     part.dropout.seed != nullptr ? part.dropout : keeps};
  }
  return work;
}

WeightGradSm80Work sm80_work_of(const WeightGradPass& pass, const WeightGradPlan& plan,
                                void* workspace) {
  const WeightGradArgs& a = pass.grad;
  const Matrix x = plan.x.at(workspace), h = plan.h.at(workspace);
  WeightGradSm80Work work{pass.with_grad ? floats_at(workspace, plan.grad_offset) : nullptr,
                          pass.with_sums ? floats_at(workspace, plan.sums_offset) : nullptr,
                          x,
                          h,
                          has_vectors(x, a.M),
                          has_vectors(h, a.M),
                          a.M,
                          a.K,
                          plan.pitch,
                          plan.rows,
                          static_cast<uint32_t>(plan.rank_blocks),
                          0,
                          {}};
  work.part_count = static_cast<uint32_t>(parts_of(pass, work.parts));
  number_blocks(work.parts, static_cast<int>(work.part_count), plan.rank);
  return work;
}

WeightGradMaps maps_of(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace) {
  constexpr int kRows = 128;
  const TensorMapSpec x = plan.x.map(workspace, kRows);
  WeightGradMaps maps{x, x, x};  // any valid one where nothing is loaded
  if (pass.with_grad) maps.h = plan.h.map(workspace, kRows);
  if (plan.makes_down) maps.down = plan.down.map(workspace, kRowElements);
  return maps;
}

std::string describe(const WeightGradPlan& p) {
  if (!p.served) return p.reason;
  if (p.empty) return "there is nothing to read";
  const auto number = [](int64_t n) { return std::to_string(n); };
  std::string text = (p.kernel == Kernel::sm90 ? "weight_grad_sm90 " : "weight_grad_sm80 ") +
                     number(p.rank) + " ranks, " + number(p.chunks) + " chunks of " +
                     number(p.rows) + " rows x " + number(p.splits) + " splits of " +
                     number(p.tiles * kRowElements) + " columns";
  if (p.rank_blocks > 1) text += " x " + number(p.rank_blocks) + " blocks of ranks";
  if (p.masks > 1) text += ", " + number(p.masks) + " masks";
  text += ", " + number(p.shared_bytes / 1024) + " KB shared";
  return p.kernel == Kernel::sm90 ? text : text + " (" + p.reason + ")";
}

}  // namespace lora_kernels

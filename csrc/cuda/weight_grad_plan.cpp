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

const char* not_served(const WeightGradArgs& a, const Target& target) {
  constexpr int64_t kMargin = 1024;  // a chunk may reach past the last row
  if (const char* reason = no_sm90a(target)) return reason;
  if (std::max({a.M, a.K, a.r}) >= kTmaLimit - kMargin)
    return "a dimension is past 2^31, which TMA cannot address";
  // reduce.cuh counts them, in fours, by 32 bits and steps on by less than this many.
  if (std::max(a.M, a.K) * reduce_pitch(a.r) / 4 >= (int64_t{1} << 32) - (1 << 24))
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

}  // namespace

WeightGradPlan plan_weight_grad(const WeightGradPass& pass, const Target& target) {
  const WeightGradArgs& a = pass.grad;
  WeightGradPlan plan{};
  plan.reason = not_served(a, target);
  plan.served = plan.reason == nullptr;
  plan.kernel = plan.served ? Kernel::sm90 : Kernel::none;
  plan.makes_down = plan.served && pass.with_down;
  plan.empty = a.M == 0 || a.K == 0;
  plan.pitch = reduce_pitch(a.r);
  plan.masks = pass.masked() ? std::max(1, pass.part_count) : 0;
  if (!plan.served || plan.empty) return plan;
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
  MaskedGradWork work{work_of(pass, plan, workspace), static_cast<uint32_t>(plan.masks), {}};
  work.parts[0] = {0, work.r, pass.grad.dropout};
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
  std::string text = "weight_grad_sm90 " + number(p.rank) + " ranks, " + number(p.chunks) +
                     " chunks of " + number(p.rows) + " rows x " + number(p.splits) +
                     " splits of " + number(p.tiles * kRowElements) + " columns";
  if (p.rank_blocks > 1) text += " x " + number(p.rank_blocks) + " blocks of ranks";
  if (p.masks > 1) text += ", " + number(p.masks) + " masks";
  return text + ", " + number(p.shared_bytes / 1024) + " KB shared";
}

}  // namespace lora_kernels

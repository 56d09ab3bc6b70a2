#include "backward_plan.h"

#include <algorithm>
#include <cstdio>

#include "model.h"

namespace lora_kernels {

WeightGradPass dy_pass_of(const BackwardArgs& a, const Matrix& dh) {
  WeightGradPass pass{};
  pass.with_grad = a.need_b && a.r > 0;
  pass.with_down = pass.with_grad && a.needs_dh();
  pass.with_sums = a.need_bias;
  pass.grad = {a.h, a.dy, transposed(a.db), a.M, a.N, a.r, a.up_scale, {}};
  pass.down = dh_args_of(a, a.dy, dh);
  pass.sums = a.dbias;
  return pass;
}

WeightGradPass x_pass_of(const BackwardArgs& a, const Matrix& dh) {
  WeightGradPass pass{};
  pass.with_grad = a.need_a && a.r > 0;
  pass.grad = {dh, a.x, a.da, a.M, a.K, a.r, a.masked_scale, a.dropout};
  return pass;
}

FusedGemmArgs dx_args_of(const BackwardArgs& a, const Matrix& dh) {
  const Matrix no_bias{nullptr, 0, 0, a.dy.dtype};
  const float scale = a.dropout.seed != nullptr ? a.masked_scale : a.up_scale;
  return {a.dy,    transposed(a.weight),
          dh,      transposed(a.lora_a),
          no_bias, a.dx,
          a.M,     a.K,
          a.N,     a.r,
          scale,   a.dropout};
}

DownProjArgs dh_args_of(const BackwardArgs& a, const Matrix& dy, const Matrix& dh) {
  return {dy, transposed(a.lora_b), dh, a.M, a.N, a.r, a.h_scale, {}};
}

namespace {

// Clocks of the masked term of one tile: products by mma.sync and what is added, which no load
// hides. The mask is drawn in the main loop.
double masked_cycles(const FusedGemmPlan& gemm) {
  constexpr double kFragmentClocks = 120, kStepClocks = 16;  // of 16 columns; more for a k16 step
  if (!gemm.masked) return 0;
  const auto steps = static_cast<double>(ceil_div(gemm.r, kMmaDepth));
  return gemm.tile_n / 16.0 * (kFragmentClocks + steps * kStepClocks);
}

// What the LoRA terms add to the tiles of dx: clocks of one.
double tile_extra(const BackwardArgs& a, const FusedGemmPlan& gemm) {
  if (gemm.masked) return masked_cycles(gemm);
  const int64_t steps = ceil_div(a.N, kMmaDepth), ranks = ceil_div(gemm.r, kMmaDepth);
  return tile_cycles(gemm.tile_n, steps + ranks) - tile_cycles(gemm.tile_n, steps);
}

double waves_of(const FusedGemmPlan& gemm) {
  return static_cast<double>(ceil_div(gemm.raster.items(), gemm.clusters));
}

// What the passes add to the frozen GEMM: clocks.
double passes_cost(const BackwardArgs& a, const BackwardPlan& plan) {
  double cycles = plan.dy_pass.cycles + plan.x_pass.cycles;
  const bool by_down_proj = a.needs_dh() && !(a.need_b && a.r > 0);
  if (by_down_proj) cycles += memory_clocks(static_cast<double>(a.M * a.N) * 2);
  const int launches = 2 * plan.reads_dy + 2 * plan.reads_x + by_down_proj;
  return cycles + launches * kLaunchSeconds * kClock;
}

// ---- one grid -----------------------------------------------------------------------------------

// nullptr if one grid serves the call, else why not.
const char* not_one_grid(const BackwardArgs& a, const BackwardPlan& plan,
                         const FusedGemmPlan& gemm) {
  if (!a.need_x || !plan.reads_x || !a.need_b) return "not all three gradients are wanted";
  if (a.need_bias) return "the bias is trained";
  if (gemm.empty || plan.dy_pass.empty || gemm.r == 0) return "there is no LoRA term";
  if (gemm.kernel == Kernel::sm80) return "only the sm_90a kernels have that form";
  if (a.r > kGridRanks[1]) return "r is more than 64";
  for (const WeightGradPlan* pass : {&plan.dy_pass, &plan.x_pass})
    if (pass->kernel != Kernel::sm90) return pass->reason;
  if (!gemm.mn_major) return "the weight is transposed";
  if (!has_backward_tile(gemm.tile_n)) return "its tile has no such kernel";
  return nullptr;
}

struct ItemClocks {
  double dy, x, sums;  // of a chunk; of one over all slices; of all sums
};
ItemClocks item_clocks(const BackwardArgs& a, const OneGridPlan& grid) {
  constexpr double kStage = 128 * kRowBytes, kLatency = 800;  // of L2
  constexpr double kPort = 128;                               // bytes a clock of shared memory
  const double kDown = grid.rank * double{kRowBytes};
  const double kProduct = 8 * (2048 + 32.0 * grid.rank);  // bytes that 8 wgmma m64 k16 read
  const double chunk = 2 * 2 * 128.0 * grid.rank / kStreamBytes + kItemClocks;
  const double dy =
      std::max((kStage + kDown) / kStreamBytes, (2 * kProduct + kStage + kDown) / kPort);
  // The products of a masked stage come after its mask: both warpgroups meet in between.
  const double mask = a.dropout.seed != nullptr ? kDropoutClocks : 0;
  const double x = std::max(kStage / kStreamBytes, (kProduct + kStage) / kPort) + mask;
  const auto stages = [](int64_t columns) {
    return static_cast<double>(BackwardOrder::kChunkPairs * ceil_div(columns, kRowElements));
  };
  const BackwardOrder& order = grid.order;
  const double sum = kItemClocks + ceil_div(2 * int64_t{order.chunks()}, 8) * kLatency;
  return {stages(a.N) * dy + chunk, stages(a.K) * x + order.slices * chunk,
          (order.sums_b + double(order.slices) * order.sums_a) * sum};
}

// Items beside the tiles are free as far as the last wave leaves turns idle. Reading x hides behind
// products, but for the last group, whose items may find nothing else running.
double one_grid_cost(const BackwardArgs& a, const BackwardPlan& plan, const FusedGemmPlan& gemm) {
  const OneGridPlan& grid = plan.grid;
  const ItemClocks item = item_clocks(a, grid);
  const double tile = tile_cycles(gemm.tile_n, ceil_div(a.N, kMmaDepth));
  const double idle = (waves_of(gemm) * grid.clusters - gemm.raster.items()) * tile;
  const double more = grid.order.chunks() * (item.dy + item.x) + item.sums - idle;
  const double last = static_cast<double>(grid.order.last_chunks()) / grid.order.chunks();
  const double partials = 2.0 * grid.order.chunks() * double(a.K * plan.dy_pass.pitch) * 4;
  const double memory =
      memory_clocks(last * (double(a.M * a.K * 2) + 2 * partials)) - idle / grid.clusters;
  // The first tiles wait for dh, the end for the last item of x and for what adds its results.
  const double head = std::max(0.0, item.dy - tile);
  const double tail = item.x / grid.order.slices + kItemClocks;
  return std::max({0.0, more / grid.clusters, memory}) + head + tail + kFlagClocks +
         (kZeroSeconds + (grid.turned() ? kLaunchSeconds : 0)) * kClock + gemm_cycles(gemm, a.N) -
         gemm_cycles(plan.gemm, a.N);
}

void plan_one_grid(const BackwardArgs& a, const Target& target, const FusedGemmPlan& gemm,
                   BackwardPlan& plan) {
  constexpr int64_t kSlices = 8, kLeastBlocks = 8;
  OneGridPlan& grid = plan.grid;
  BackwardOrder& order = grid.order;
  const Raster& tiles = gemm.raster;
  grid.rank = kGridRanks[a.r > kGridRanks[0]];
  const uint32_t group = std::min(tiles.group + tiles.group % 2, tiles.pairs);
  constexpr uint32_t kChain = BackwardOrder::kChunkPairs;
  const int64_t blocks = ceil_div(a.K, kRowElements);
  const int64_t of_slice = std::max(kLeastBlocks, ceil_div(blocks, kSlices));
  grid.blocks_of_slice = static_cast<uint32_t>(of_slice);
  order.slices = static_cast<uint32_t>(ceil_div(blocks, of_slice));
  const uint32_t trail = group / kChain * order.slices;
  order.raster = Raster(tiles.pairs, tiles.columns, group, kChain, false, trail);
  grid.clusters = clusters_of(target, order.raster.items());
  if (order.chunks() <= (grid.clusters + 3) / 4)
    order.raster = Raster(tiles.pairs, tiles.columns, group, kChain, true, trail);
  // A thread adds four columns, and two sums for each cluster are enough.
  constexpr int64_t kThreads = 512;
  const int64_t pitch = plan.dy_pass.pitch, wide = std::max(a.N, a.K);
  const int64_t turns = std::max<int64_t>(1, wide * pitch / (4 * kThreads * 2 * grid.clusters));
  const int64_t rows = std::max<int64_t>(1, 4 * kThreads * turns / pitch);
  grid.rows_of_sum = static_cast<uint32_t>(rows);
  order.sums_b = static_cast<uint32_t>(ceil_div(a.N, rows));
  order.sums_a =
      static_cast<uint32_t>(ceil_div(std::min(a.K, of_slice * int64_t{kRowElements}), rows));
}

// Of dx in the best tile that has a kernel for one grid.
FusedGemmPlan grid_gemm(const BackwardArgs& a, const Target& target, const FusedGemmPlan& gemm,
                        const FusedGemmRequest& request) {
  if (!gemm.served || gemm.empty || gemm.kernel == Kernel::sm80 || request.tile_n != 0 ||
      has_backward_tile(gemm.tile_n))
    return gemm;
  const FusedGemmArgs args = dx_args_of(a, gemm.h.from);
  const FusedGemmPlan wide = plan_fused_gemm(args, target, {256, request.group});
  const FusedGemmPlan narrow = plan_fused_gemm(args, target, {128, request.group});
  return gemm_cycles(wide, a.N) <= gemm_cycles(narrow, a.N) ? wide : narrow;
}

void choose_form(const BackwardArgs& a, const Target& target, const BackwardRequest& request,
                 BackwardPlan& plan) {
  const BackwardForm wanted = request.form;
  const FusedGemmPlan gemm = grid_gemm(a, target, plan.gemm, request.gemm);
  const char* one = not_one_grid(a, plan, gemm);
  plan.form = BackwardForm::passes;
  plan.reason = one;
  if (wanted == BackwardForm::one_grid && one != nullptr) plan.served = false;
  double cost = passes_cost(a, plan);
  const double frozen = a.need_x && !plan.gemm.empty ? gemm_cycles(plan.gemm, a.N) : 0;
  if (one == nullptr) {
    plan_one_grid(a, target, gemm, plan);
    const double in_one = one_grid_cost(a, plan, gemm);
    const bool better = in_one < cost;
    plan.reason = better
                      ? "all gradients take turns that the grid has left, by the model"
                      : "all gradients would take more turns than passes take time, by the model";
    if (wanted != BackwardForm::any) plan.reason = "as was asked for";
    if (wanted == BackwardForm::one_grid || (wanted == BackwardForm::any && better)) {
      plan.form = BackwardForm::one_grid;
      plan.gemm = gemm;
      cost = in_one;
    }
  }
  if (frozen == 0 || plan.gemm.kernel == Kernel::sm80) return;  // the model is of a Hopper
  cost += waves_of(plan.gemm) * tile_extra(a, plan.gemm);
  plan.overhead = cost / frozen;
}

const char* not_served(const BackwardArgs& a, const BackwardPlan& plan) {
  if (a.need_x && !plan.gemm.served) return plan.gemm.reason;
  if (plan.reads_dy && !plan.dy_pass.served) return plan.dy_pass.reason;
  if (plan.reads_x && !plan.x_pass.served) return plan.x_pass.reason;
  return nullptr;
}

void place_operands(const BackwardArgs& a, BackwardPlan& plan) {
  int64_t end = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = end;
    end += ceil_div(bytes, 128) * 128;
    return offset;
  };
  if (a.needs_dh()) plan.dh_offset = reserve(a.M * plan.dh_width * 2);
  const bool has_dx = a.need_x && !plan.gemm.empty;
  if (has_dx || (plan.reads_dy && !plan.dy_pass.empty)) {
    plan.dy = tma_operand(a.dy, a.M, a.N);
    plan.dy.offset = reserve(plan.dy.bytes());
  } else {
    plan.dy.from = a.dy;  // down_proj takes it as it lies
  }
  plan.gemm.h.packed = plan.x_pass.h.packed = false;  // dh is made here, as TMA needs it
  plan.gemm.x = plan.dy_pass.x = plan.dy;
  if (plan.form == BackwardForm::one_grid && plan.grid.turned()) {
    plan.turned_offset = reserve(a.r * ceil_div(a.M, 8) * 16);
    plan.dy_pass.h = tma_operand(transposed(a.h), a.r, a.M);
    plan.dy_pass.down = tma_operand(transposed(a.lora_b), a.r, a.N);
  }
  for (TmaOperand* o :
       {&plan.gemm.weight, &plan.gemm.up, &plan.dy_pass.h, &plan.dy_pass.down, &plan.x_pass.x})
    o->offset = reserve(o->bytes());
  WeightGradPass dy_pass = dy_pass_of(a, {}), x_pass = x_pass_of(a, {});
  if (plan.form == BackwardForm::one_grid) {
    plan.dy_pass.chunks = plan.x_pass.chunks = 2 * int64_t{plan.grid.order.chunks()};
    plan.dy_pass.makes_down = false;  // sums of dh stay in registers
  }
  if (plan.reads_dy) end = place_partials(dy_pass, plan.dy_pass, end);
  if (plan.reads_x) end = place_partials(x_pass, plan.x_pass, end);
  if (plan.form == BackwardForm::one_grid)
    plan.grid.sync_offset = reserve(4 * plan.grid.sync_words());
  plan.workspace_bytes = end;
}

}  // namespace

BackwardPlan plan_backward(const BackwardArgs& args, const Target& target,
                           const BackwardRequest& request) {
  BackwardPlan plan{};
  plan.dh_width = std::max<int64_t>(8, ceil_div(args.r, 8) * 8);
  const Matrix dh{nullptr, plan.dh_width, 1, args.dy.dtype};
  const WeightGradPass dy_pass = dy_pass_of(args, dh), x_pass = x_pass_of(args, dh);
  plan.reads_dy = dy_pass.with_grad || dy_pass.with_sums;
  plan.reads_x = x_pass.with_grad;
  if (plan.reads_dy) plan.dy_pass = plan_weight_grad(dy_pass, target);
  if (plan.reads_x) plan.x_pass = plan_weight_grad(x_pass, target);
  if (args.need_x) plan.gemm = plan_fused_gemm(dx_args_of(args, dh), target, request.gemm);
  plan.reason = not_served(args, plan);
  plan.served = plan.reason == nullptr;
  if (plan.served) choose_form(args, target, request, plan);
  if (!plan.served) return plan;
  place_operands(args, plan);
  if (plan.form == BackwardForm::passes && args.needs_dh() && !plan.dy_pass.makes_down)
    plan.down = plan_down_proj(dh_args_of(args, plan.dy.at(nullptr), dh), target);
  return plan;
}

PackJobs pack_jobs(const BackwardPlan& plan, void* workspace) {
  PackJobs jobs;
  for (const TmaOperand* o : {&plan.dy, &plan.gemm.weight, &plan.gemm.up, &plan.dy_pass.h,
                              &plan.dy_pass.down, &plan.x_pass.x})
    jobs.add(*o, workspace);
  return jobs;
}

std::string describe(const BackwardPlan& plan) {
  if (!plan.served) return plan.reason;
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : "; ") + what; };
  if (plan.form == BackwardForm::one_grid) {
    const BackwardOrder& order = plan.grid.order;
    text = "one grid (" + std::string(plan.reason) +
           "): " + describe(plan.gemm, plan.gemm.raster, plan.grid.clusters) + ", " +
           std::to_string(order.chunks()) + " chunks of dy and of x, these in " +
           std::to_string(order.slices) + " slices";
  } else {
    if (plan.reads_dy) add("dy pass " + describe(plan.dy_pass));
    if (plan.down.kernel != Kernel::none) add("dh " + describe(plan.down));
    if (plan.gemm.served) add("dx " + describe(plan.gemm));
    if (plan.reads_x) add("x pass " + describe(plan.x_pass));
    if (text.empty()) return "no gradient is needed";
    text = "passes (" + std::string(plan.reason) + "): " + text;
  }
  std::string copied;
  const std::pair<const TmaOperand*, const char*> more[] = {
      {&plan.dy_pass.h, "h"}, {&plan.dy_pass.down, "B"}, {&plan.x_pass.x, "x"}};
  for (const auto& [operand, name] : more)
    if (operand->packed) copied += (copied.empty() ? "" : ", ") + std::string(name);
  if (!copied.empty()) add("copied first for the gradients of A and B: " + copied);
  if (plan.overhead == 0) return text;
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.1f %%", 100 * plan.overhead);
  return text + "; " + percent + " over the frozen GEMM of dx by the model";
}

}  // namespace lora_kernels

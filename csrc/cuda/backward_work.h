// What the kernel that does the whole backward pass is told, from arguments and plan.
#pragma once
#include "backward_plan.h"
#include "fused_gemm_work.h"

namespace lora_kernels {

struct BackwardWork {
  FusedGemmWork gemm;  // of dx
  BackwardOrder order;
  uint32_t* ticket;                    // zeroed by the launch ahead, as are the next three
  uint32_t* flags;                     // one for 128 rows of dh
  uint32_t *dy_done, *x_done;          // blocks whose partial results are written; x: of each slice
  DownProjArgs dh;                     // where it goes
  Matrix turned_dh;                    // and again, with its ranks as rows: for tiles of 16 ranks
  float *db, *da;                      // partial results
  uint32_t pitch;                      // of their rows
  uint32_t blocks_x, blocks_of_slice;  // of 64 columns of x
  uint32_t rows_of_sum;
  ReduceJob sum_b, sum_a;

  LK_SHARED_FUNCTION int64_t partial(uint32_t pair, uint32_t rank) const {
    return int64_t{pair} / BackwardOrder::kChunkPairs * 2 + rank;
  }
  LK_SHARED_FUNCTION uint32_t end_of_slice(uint32_t slice) const {
    const uint32_t end = (slice + 1) * blocks_of_slice;
    return end < blocks_x ? end : blocks_x;
  }
};

inline BackwardWork work_of(const BackwardArgs& args, const BackwardPlan& plan, void* workspace) {
  const OneGridPlan& grid = plan.grid;
  const Matrix dh = plan.dh(workspace, args.dy.dtype);
  auto* bytes = static_cast<uint8_t*>(workspace);
  auto* words = reinterpret_cast<uint32_t*>(bytes + grid.sync_offset);
  const int64_t flags = grid.flags();
  WeightGradPass dy_pass = dy_pass_of(args, dh), x_pass = x_pass_of(args, dh);
  WeightGradPlan dy = plan.dy_pass, x = plan.x_pass;
  dy.chunks = x.chunks = 2 * int64_t{grid.order.chunks()};  // of each block of a cluster
  return {work_of(dx_args_of(args, dh), plan.gemm, plan.gemm.raster, workspace),
          grid.order,
          words,
          words + 1,
          words + 1 + flags,
          words + 2 + flags,
          dh_args_of(args, args.dy, dh),
          transposed(plan.turned_dh(args, workspace)),
          reinterpret_cast<float*>(bytes + dy.grad_offset),
          reinterpret_cast<float*>(bytes + x.grad_offset),
          static_cast<uint32_t>(dy.pitch),
          stages_of(args.K),
          grid.blocks_of_slice,
          grid.rows_of_sum,
          grad_job(dy_pass, dy, workspace),
          grad_job(x_pass, x, workspace)};
}

// TMA's view of the operands, beside those of dx (maps_of).
struct BackwardOnlyMaps {
  TensorMapSpec h, down, x, turned_dh;  // the last as items of x keep it
};
inline BackwardOnlyMaps backward_maps_of(const BackwardArgs& args, const BackwardPlan& plan,
                                         void* workspace) {
  constexpr int kRows = 128;
  const int rank = plan.grid.rank;
  const bool turned = plan.grid.turned();
  const TensorMapSpec x = plan.x_pass.x.map(workspace, kRows);
  BackwardOnlyMaps maps{plan.dy_pass.h.map(workspace, turned ? rank : kRows),
                        // Each block loads half.
                        plan.dy_pass.down.map(workspace, (turned ? rank : kRowElements) / 2), x, x};
  if (turned)
    maps.turned_dh =
        tma_operand(plan.turned_dh(args, workspace), args.r, args.M).map(nullptr, rank);
  return maps;
}
// The gemm as it finds dh.
inline FusedGemmPlan gemm_of(const BackwardArgs& args, const BackwardPlan& plan, void* workspace) {
  FusedGemmPlan gemm = plan.gemm;
  gemm.h.from = plan.dh(workspace, args.dy.dtype);
  return gemm;
}

}  // namespace lora_kernels

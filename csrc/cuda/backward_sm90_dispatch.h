// Which instance of backward_sm90_kernel serves a plan. Behind backward_sm90.cuh, or behind the
// declaration that stands for it where sm_90a is not compiled.
#pragma once
#include "backward_plan.h"

namespace lora_kernels {

// Calls launch(kernel).
template <class T, class Launch>
void with_backward_sm90(const BackwardPlan& plan, const Launch& launch) {
  with_fused_gemm_tile(plan.gemm.tile_n, [&](auto tile) {
    using Tile = decltype(tile);
    if constexpr (has_backward_tile(Tile::kN)) {
      constexpr int kLow = kGridRanks[0], kHigh = kGridRanks[1];
      if (plan.grid.turned())
        launch(backward_sm90_kernel<Tile, T, kLow>);
      else
        launch(backward_sm90_kernel<Tile, T, kHigh>);
    }
  });
}

}  // namespace lora_kernels

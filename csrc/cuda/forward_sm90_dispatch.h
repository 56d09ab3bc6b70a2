// Which instance of forward_sm90_kernel serves a plan. Behind forward_sm90.cuh, or behind the
// declaration that stands for it where sm_90a is not compiled.
#pragma once
#include "forward_plan.h"

namespace lora_kernels {

// Calls launch(kernel).
template <class T, class Launch>
void with_forward_sm90(const ForwardPlan& plan, bool dropout, const Launch& launch) {
  with_fused_gemm_tile(plan.gemm.tile_n, [&](auto tile) {
    using Tile = decltype(tile);
    constexpr int kLow = kForwardRanks[0], kHigh = kForwardRanks[1];
    if (plan.rank == kLow && dropout)
      launch(forward_sm90_kernel<Tile, T, kLow, true>);
    else if (plan.rank == kLow)
      launch(forward_sm90_kernel<Tile, T, kLow, false>);
    else if (dropout)
      launch(forward_sm90_kernel<Tile, T, kHigh, true>);
    else
      launch(forward_sm90_kernel<Tile, T, kHigh, false>);
  });
}

}  // namespace lora_kernels

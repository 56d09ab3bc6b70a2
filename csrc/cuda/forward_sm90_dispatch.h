// Which instance of forward_sm90_kernel serves a plan. Behind forward_sm90.cuh, or behind the
// declaration that stands for it where sm_90a is not compiled.
#pragma once
#include "forward_plan.h"

namespace lora_kernels {

// Calls launch(kernel).
template <class T, class Launch>
void with_forward_sm90(const ForwardPlan& plan, const Launch& launch) {
  with_fused_gemm_tile(plan.gemm.tile_n, [&](auto tile) {
    using Tile = decltype(tile);
    if (plan.rank == kForwardRanks[0])
      launch(forward_sm90_kernel<Tile, T, kForwardRanks[0]>);
    else
      launch(forward_sm90_kernel<Tile, T, kForwardRanks[1]>);
  });
}

}  // namespace lora_kernels

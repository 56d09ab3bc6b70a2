// Which instance of fused_gemm_sm90_kernel serves a plan. Behind fused_gemm_sm90.cuh, or behind the
// declaration that stands for it where sm_90a is not compiled.
#pragma once
#include "fused_gemm_plan.h"

namespace lora_kernels {

// Calls launch(kernel).
template <class T, class Launch>
void with_fused_gemm_sm90(const FusedGemmGroup& group, const Launch& launch) {
  const FusedGemmPlan& plan = group.plans[0];
  with_fused_gemm_tile(plan.tile_n, [&](auto tile) {
    using Tile = decltype(tile);
    if (group.masked())
      launch(fused_gemm_sm90_kernel<Tile, T, true, true>);
    else if (plan.mn_major)
      launch(fused_gemm_sm90_kernel<Tile, T, true, false>);
    else
      launch(fused_gemm_sm90_kernel<Tile, T, false, false>);
  });
}

}  // namespace lora_kernels

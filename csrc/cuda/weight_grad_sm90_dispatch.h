// Which instance of weight_grad_sm90_kernel serves a plan. Behind weight_grad_sm90.cuh, or behind
// the declaration that stands for it where sm_90a is not compiled.
#pragma once
#include "weight_grad_plan.h"

namespace lora_kernels {

// Calls launch(kernel, what it is told).
template <class T, class Launch>
void with_weight_grad_sm90(const WeightGradPass& pass, const WeightGradPlan& plan, void* workspace,
                           const Launch& launch) {
  with_weight_grad_tile(plan.rank, [&](auto tile) {
    using Tile = decltype(tile);
    if (pass.with_down)
      launch(weight_grad_sm90_kernel<Tile, T, true>, work_of(pass, plan, workspace));
    else
      launch(weight_grad_sm90_kernel<Tile, T, false>, masked_work_of(pass, plan, workspace));
  });
}

}  // namespace lora_kernels

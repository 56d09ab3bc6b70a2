// Which instance of down_proj_sm90_kernel serves a plan. Behind down_proj_sm90.cuh, or behind the
// declaration that stands for it where sm_90a is not compiled.
#pragma once
#include "down_proj_plan.h"

namespace lora_kernels {

// Calls launch(kernel); false if no instance was built for the plan.
template <class T, class Launch>
bool with_down_proj_sm90(const DownProjPlan& plan, const Launch& launch) {
  bool found = false;
  with_sm90_tile(plan, [&](auto tile) {
    using Tile = decltype(tile);
    found = true;
    if (!plan.layout.mn_major)
      launch(down_proj_sm90_kernel<Tile, T, false>);
    else if constexpr (Tile::kRank >= kRowElements)
      launch(down_proj_sm90_kernel<Tile, T, true>);
    else
      found = false;
  });
  return found;
}

}  // namespace lora_kernels

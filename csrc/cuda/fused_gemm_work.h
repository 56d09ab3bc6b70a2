// What the kernels that compute y are told, from arguments and plan.
#pragma once
#include "fused_gemm_plan.h"

namespace lora_kernels {

// Where y goes, and what is added to it.
struct GemmOutput {
  uint16_t* y;
  int64_t y_stride;
  const uint16_t* bias;  // contiguous; nullptr: none
  uint32_t M, N;
  bool by_tma;  // else by ordinary stores
};

struct FusedGemmWork {
  GemmOutput out;
  Raster raster;
  uint32_t blocks_k, blocks_r;  // stages of the frozen product, of the LoRA term
  uint32_t rank_steps;          // k16 steps of the LoRA term
  float scale, inverse;         // of the LoRA term, and 1 / scale
  Dropout mask;                 // of the LoRA term
};

// TMA's view of the operands, in the order of the kernels' parameters.
struct FusedGemmMaps {
  TensorMapSpec x, weight, h, up, y;
};

inline uint32_t stages_of(int64_t depth) {
  return static_cast<uint32_t>(ceil_div(depth, kRowElements));
}

inline FusedGemmWork work_of(const FusedGemmArgs& a, const FusedGemmPlan& plan,
                             const Raster& raster, void* workspace) {
  const int64_t depth = a.K > 0 ? a.K : plan.x.width();  // without depth, a stage of zeros
  return {{static_cast<uint16_t*>(a.y.data), a.y.row_stride,
           static_cast<const uint16_t*>(plan.bias.at(workspace).data), static_cast<uint32_t>(a.M),
           static_cast<uint32_t>(a.N), plan.y_vectors},
          raster,
          stages_of(depth),
          stages_of(plan.r),
          static_cast<uint32_t>(ceil_div(plan.r, kMmaDepth)),
          plan.r > 0 ? a.scale : 1.0f,
          plan.r > 0 ? 1.0f / a.scale : 1.0f,
          a.dropout};
}

inline FusedGemmMaps maps_of(const FusedGemmArgs& a, const FusedGemmPlan& plan, void* workspace) {
  constexpr int kRows = 128;
  const TensorMapSpec x = plan.x.map(workspace, kRows);
  const TensorMapSpec weight = plan.weight.map(workspace, b_box_rows(plan));
  FusedGemmMaps maps{x, weight, x, weight, x};  // any valid one where nothing is loaded or stored
  if (plan.r > 0) {
    maps.h = plan.h.map(workspace, kRows);
    maps.up = plan.up.map(workspace, b_box_rows(plan));
  }
  if (plan.y_vectors) maps.y = tma_operand(a.y, a.M, a.N).map(nullptr, 64);
  return maps;
}

}  // namespace lora_kernels

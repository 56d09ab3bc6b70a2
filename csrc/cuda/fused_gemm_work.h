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

// A frozen product and its LoRA term.
struct GemmSegment {
  uint32_t blocks_k, blocks_r;  // stages of the frozen product, of the LoRA term
  uint32_t rank_steps;          // k16 steps of the LoRA term
  float scale, inverse;         // of the LoRA term, and 1 / scale
  Dropout mask;                 // of the LoRA term
};

// One segment, one output: of the kernels that make more than y.
struct FusedGemmWork : GemmSegment {
  GemmOutput out;
  Raster raster;
};

// A group: an output for each segment, whose tiles stand side by side, or one for all, in which
// they are added up.
struct FusedGemmGroupWork {
  Raster raster;
  uint32_t count, segments_of_output;
  uint32_t ends[kMaxGroup];  // of each output's columns of tiles
  GemmOutput out[kMaxGroup];
  GemmSegment segment[kMaxGroup];

  // Whose tile stands in a column, which is counted from the output's first then.
  LK_SHARED_FUNCTION uint32_t output_at(uint32_t& column) const {
    uint32_t output = 0;
    while (column >= ends[output]) ++output;
    if (output > 0) column -= ends[output - 1];
    return output;
  }
};

// TMA's view of the operands, in the order of the kernels' parameters.
template <class Map>
struct GemmMaps {
  Map x, weight, h, up, y;
};
using FusedGemmMaps = GemmMaps<TensorMapSpec>;
template <class Map>
struct GemmGroupMaps {
  GemmMaps<Map> each[kMaxGroup];  // of a segment; y of an output
};

inline uint32_t stages_of(int64_t depth) {
  return static_cast<uint32_t>(ceil_div(depth, kRowElements));
}

inline GemmSegment segment_of(const FusedGemmArgs& a, const FusedGemmPlan& plan) {
  const int64_t depth = a.K > 0 ? a.K : plan.x.width();  // without depth, a stage of zeros
  return {stages_of(depth),
          stages_of(plan.r),
          static_cast<uint32_t>(ceil_div(plan.r, kMmaDepth)),
          plan.r > 0 ? a.scale : 1.0f,
          plan.r > 0 ? 1.0f / a.scale : 1.0f,
          a.dropout};
}

inline GemmOutput output_of(const FusedGemmArgs& a, const FusedGemmPlan& plan, void* workspace) {
  return {static_cast<uint16_t*>(a.y.data),
          a.y.row_stride,
          static_cast<const uint16_t*>(plan.bias.at(workspace).data),
          static_cast<uint32_t>(a.M),
          static_cast<uint32_t>(a.N),
          plan.y_vectors};
}

inline FusedGemmWork work_of(const FusedGemmArgs& a, const FusedGemmPlan& plan,
                             const Raster& raster, void* workspace) {
  return {segment_of(a, plan), output_of(a, plan, workspace), raster};
}

inline FusedGemmGroupWork work_of(const FusedGemmGroup& group, void* workspace) {
  FusedGemmGroupWork work{};
  work.raster = group.raster;
  work.count = static_cast<uint32_t>(group.count);
  work.segments_of_output = group.added ? work.count : 1;

  uint32_t end = 0;
  for (int i = 0; i < group.outputs(); ++i) {
    work.out[i] = output_of(group.args[i], group.plans[i], workspace);
    work.ends[i] = end += group.plans[i].raster.columns;
  }
  for (int i = 0; i < group.count; ++i) {
    GemmSegment& segment = work.segment[i] = segment_of(group.args[i], group.plans[i]);
    // One without a mask among masked ones keeps all that it would draw.
    if (group.masked() && segment.mask.seed == nullptr) segment.mask = group.mask_of_none();
  }
  return work;
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

inline GemmGroupMaps<TensorMapSpec> maps_of(const FusedGemmGroup& group, void* workspace) {
  GemmGroupMaps<TensorMapSpec> maps;
  for (int i = 0; i < group.count; ++i)
    maps.each[i] = maps_of(group.args[i], group.plans[i], workspace);
  return maps;
}

}  // namespace lora_kernels

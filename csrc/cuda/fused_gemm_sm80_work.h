// What fused_gemm_sm80.cuh is told, from arguments and plan.
#pragma once
#include "fused_gemm_plan.h"

namespace lora_kernels {

// Rows of an operand, contiguous and on 16-byte boundaries.
struct Sm80Operand {
  const uint16_t* data;
  int64_t stride;
};

// A frozen product and its LoRA term, as GemmSegment, which has sizes of 32 bits.
struct Sm80Segment {
  Sm80Operand x, weight, h, up;
  int64_t K, r;
  uint32_t blocks_k, blocks_r;  // stages of the frozen product, of the LoRA term
  float scale, inverse;         // of the LoRA term, and 1 / scale
  Dropout mask;                 // of the LoRA term
};

// Where y goes, and what is added to it.
struct Sm80Output {
  uint16_t* y;
  int64_t stride;
  const uint16_t* bias;  // contiguous; nullptr: none
  int64_t M, N;
  bool vectors;  // rows of y are on 16-byte boundaries
};

// As FusedGemmGroupWork.
struct FusedGemmSm80Work {
  Raster raster;  // its pairs are single blocks of rows here
  uint32_t count, segments_of_output;
  uint32_t ends[kMaxGroup];  // of each output's columns of tiles
  Sm80Output out[kMaxGroup];
  Sm80Segment segment[kMaxGroup];

  // Whose tile stands in a column, which is counted from the output's first then.
  LK_SHARED_FUNCTION uint32_t output_at(uint32_t& column) const {
    uint32_t output = 0;
    while (column >= ends[output]) ++output;
    if (output > 0) column -= ends[output - 1];
    return output;
  }
};

inline Sm80Operand sm80_operand(const TmaOperand& o, void* workspace) {
  const Matrix m = o.at(workspace);
  return {static_cast<const uint16_t*>(m.data), m.row_stride};
}

inline Sm80Segment sm80_segment_of(const FusedGemmArgs& a, const FusedGemmPlan& plan,
                                   void* workspace) {
  const bool adapted = plan.r > 0;
  return {sm80_operand(plan.x, workspace),
          sm80_operand(plan.weight, workspace),
          sm80_operand(plan.h, workspace),
          sm80_operand(plan.up, workspace),
          a.K,
          plan.r,
          static_cast<uint32_t>(ceil_div(a.K, kSm80Depth)),
          static_cast<uint32_t>(ceil_div(plan.r, kSm80Depth)),
          adapted ? a.scale : 1.0f,
          adapted ? 1.0f / a.scale : 1.0f,
          a.dropout};
}

inline FusedGemmSm80Work sm80_work_of(const FusedGemmGroup& group, void* workspace) {
  FusedGemmSm80Work work{};
  work.raster = group.raster;
  work.count = static_cast<uint32_t>(group.count);
  work.segments_of_output = group.added ? work.count : 1;
  uint32_t end = 0;
  for (int i = 0; i < group.outputs(); ++i) {
    const FusedGemmArgs& a = group.args[i];
    const FusedGemmPlan& plan = group.plans[i];
    work.out[i] = {static_cast<uint16_t*>(a.y.data),
                   a.y.row_stride,
                   static_cast<const uint16_t*>(plan.bias.at(workspace).data),
                   a.M,
                   a.N,
                   plan.y_vectors};
    work.ends[i] = end += plan.raster.columns;
  }
  for (int i = 0; i < group.count; ++i)
    work.segment[i] = sm80_segment_of(group.args[i], group.plans[i], workspace);
  return work;
}

}  // namespace lora_kernels

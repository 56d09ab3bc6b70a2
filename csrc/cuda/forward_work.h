// What the kernel that makes h and y is told, from arguments and plan.
#pragma once
#include "forward_plan.h"
#include "fused_gemm_work.h"

namespace lora_kernels {

struct ForwardWork {
  FusedGemmWork gemm;  // its raster has the chains of h too
  uint32_t* ticket;    // zeroed by the launch ahead
  uint32_t* flags;     // one for 128 rows, likewise
};

inline TensorMapSpec a_map_spec(const ForwardPlan& plan, void* workspace) {
  return plan.lora_a.map(workspace, plan.rank / 2);
}

inline ForwardWork work_of(const ForwardArgs& a, const ForwardPlan& plan, void* workspace) {
  auto* sync = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(workspace) + plan.sync_offset);
  return {work_of(a.gemm, plan.gemm, plan.raster, workspace), sync, sync + 1};
}

}  // namespace lora_kernels

// The source of the sm_80 kernel that makes y, compiled by g++ against the models of ptx.h.
#include "cuda/fused_gemm_sm80.cuh"

#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> fused_gemm_sm80_body(const FusedGemmGroup& group, void* workspace) {
  const FusedGemmSm80Work work = sm80_work_of(group, workspace);
  std::function<void()> body;
  with_type(group.args[0].x.dtype, [&](auto type) {
    with_fused_gemm_sm80<decltype(type)>(group.plans[0],
                                         [&](auto kernel) { body = [=] { kernel(work); }; });
  });
  return body;
}

}  // namespace emu

// The sources of the sm_90a kernels that make y, compiled by g++ against the models of ptx.h.
#include "cuda/forward_sm90.cuh"

#include "cuda/forward_sm90_dispatch.h"
#include "cuda/fused_gemm_sm90_dispatch.h"
#include "cuda/pack.cuh"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> fused_gemm_body(const FusedGemmArgs& args, const FusedGemmPlan& plan,
                                      void* workspace) {
  const FusedGemmMaps specs = maps_of(args, plan, workspace);
  const TensorMap x = encode(specs.x), weight = encode(specs.weight), h = encode(specs.h),
                  up = encode(specs.up), y = encode(specs.y);
  const FusedGemmWork work = work_of(args, plan, plan.raster, workspace);
  std::function<void()> body;
  with_type(args.x.dtype, [&](auto type) {
    with_fused_gemm_sm90<decltype(type)>(
        plan, [&](auto kernel) { body = [=] { kernel(x, weight, h, up, y, work); }; });
  });
  return body;
}

std::function<void()> forward_body(const ForwardArgs& args, const ForwardPlan& plan,
                                   void* workspace) {
  const FusedGemmMaps specs = maps_of(args.gemm, plan.gemm, workspace);
  const TensorMap x = encode(specs.x), weight = encode(specs.weight), h = encode(specs.h),
                  up = encode(specs.up), y = encode(specs.y),
                  a = encode(a_map_spec(plan, workspace));
  const ForwardWork work = work_of(args, plan, workspace);
  const DownProjArgs down = args.down;
  std::function<void()> body;
  with_type(down.x.dtype, [&](auto type) {
    with_forward_sm90<decltype(type)>(
        plan, [&](auto kernel) { body = [=] { kernel(x, weight, a, h, up, y, down, work); }; });
  });
  return body;
}

std::function<void()> pack_body(const PackJobs& jobs) {
  return [jobs] { pack_kernel(jobs); };
}

std::function<void()> zero_body(uint32_t* words, uint32_t count) {
  return [=] { zero_kernel(words, count); };
}

}  // namespace emu

// The sources of the sm_90a kernels that make y, compiled by g++ against the models of ptx.h.
#include "cuda/forward_sm90.cuh"

#include "cuda/forward_sm90_dispatch.h"
#include "cuda/fused_gemm_sm90_dispatch.h"
#include "cuda/pack.cuh"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> fused_gemm_body(const FusedGemmGroup& group, void* workspace) {
  const GemmGroupMaps<TensorMapSpec> specs = maps_of(group, workspace);
  GemmGroupMaps<TensorMap> maps{};
  for (int i = 0; i < group.count; ++i) {
    const FusedGemmMaps& s = specs.each[i];
    maps.each[i] = {encode(s.x), encode(s.weight), encode(s.h), encode(s.up), encode(s.y)};
  }
  const FusedGemmGroupWork work = work_of(group, workspace);
  std::function<void()> body;
  with_type(group.args[0].x.dtype, [&](auto type) {
    with_fused_gemm_sm90<decltype(type)>(group,
                                         [&](auto kernel) { body = [=] { kernel(maps, work); }; });
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

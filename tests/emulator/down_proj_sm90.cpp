// The source of the sm_90a kernel, compiled by g++ against the models of ptx.h.
#include "cuda/down_proj_sm90.cuh"

#include "cuda/down_proj_sm90_dispatch.h"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> down_proj_sm90_body(const DownProjArgs* each, int count,
                                          const DownProjGroupPlan& plan) {
  const TensorMap x = encode(x_map_spec(each[0], plan));
  DownProjMaps<TensorMap> down{};
  for (int i = 0; i < count; ++i) down.down[i] = encode(down_map_spec(each[i], plan, i));
  const DownProjWork work = work_of(each, count, plan);
  std::function<void()> body;
  with_type(each[0].x.dtype, [&](auto type) {
    with_down_proj_sm90<decltype(type)>(
        plan.tile, [&](auto kernel) { body = [=] { kernel(x, down, work); }; });
  });
  return body;
}

}  // namespace emu

// The source of the kernel that does the whole backward pass, compiled by g++ against the models of
// ptx.h.
#include "cuda/backward_sm90.cuh"

#include "cuda/backward_sm90_dispatch.h"
#include "encode.h"
#include "kernels.h"

namespace emu {

using namespace lora_kernels;

std::function<void()> backward_body(const BackwardArgs& args, const BackwardPlan& plan,
                                    void* workspace) {
  const Matrix dh = plan.dh(workspace, args.dy.dtype);
  const FusedGemmMaps specs =
      maps_of(dx_args_of(args, dh), gemm_of(args, plan, workspace), workspace);
  const BackwardOnlyMaps more = backward_maps_of(args, plan, workspace);
  const TensorMap dy = encode(specs.x), weight = encode(specs.weight), h = encode(specs.h),
                  up = encode(specs.up), dx = encode(specs.y), saved = encode(more.h),
                  down = encode(more.down), x = encode(more.x), turned = encode(more.turned_dh);
  const BackwardWork work = work_of(args, plan, workspace);
  std::function<void()> body;
  with_type(args.dy.dtype, [&](auto type) {
    with_backward_sm90<decltype(type)>(plan, [&](auto kernel) {
      body = [=] { kernel(dy, weight, h, up, dx, saved, down, x, turned, work); };
    });
  });
  return body;
}

}  // namespace emu

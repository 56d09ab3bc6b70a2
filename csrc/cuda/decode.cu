// The launcher of decode.cuh.
#include "decode.cuh"

#include "decode.h"

namespace lora_kernels {
namespace {

template <class T>
cudaError_t launch_typed(const ForwardArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.tiles * plan.work.splits));
  cudaError_t error = cudaErrorInvalidConfiguration;
  with_decode<T>(plan, [&](auto kernel) {
    error = launch_clusters(plan.work.splits, kernel, grid, plan.threads, plan.shared_bytes, stream,
                            false, args, plan.work);
  });
  return error;
}

}  // namespace

cudaError_t launch_decode(const ForwardArgs& args, const DecodePlan& plan, cudaStream_t stream) {
  return args.down.x.dtype == Dtype::bf16 ? launch_typed<ptx::bf16>(args, plan, stream)
                                          : launch_typed<ptx::f16>(args, plan, stream);
}

}  // namespace lora_kernels

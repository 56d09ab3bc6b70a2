// The launcher of dropout_mask.cuh.
#include "dropout_mask.cuh"
#include "dropout_mask.h"
#include "launch.h"

namespace lora_kernels {

cudaError_t launch_dropout_mask(const DropoutMaskArgs& args, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1 << 16;  // further groups by grid stride
  if (args.rows <= 0 || args.cols <= 0) return cudaSuccess;
  // The origin is on the device: allow for a window that straddles one more block each way.
  const int64_t groups = (args.rows / 16 + 2) * (args.cols / 16 + 2) * 32;
  const int64_t blocks = (groups + kMaskThreads - 1) / kMaskThreads;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  return launch_kernel(dropout_mask_kernel, grid, kMaskThreads, 0, stream, false, args);
}

}  // namespace lora_kernels

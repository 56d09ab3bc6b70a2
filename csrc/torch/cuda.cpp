// The CUDA ops. A kernel is registered here once it exists; backend.py asks the dispatcher which
// are.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/dropout_mask.h"
#include "convert.h"
#include "stream.h"

namespace lora_kernels {
namespace {

void check_launch(cudaError_t error, const char* kernel, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " [", rows, ", ", cols,
                  "]: ", cudaGetErrorString(error));
}

Tensor dropout_mask_cuda(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor mask = torch::stable::empty({rows, cols}, ScalarType::Bool, std::nullopt, seed.device());
  DropoutMaskArgs args{static_cast<bool*>(mask.mutable_data_ptr()), rows, cols,
                       dropout_of(seed, threshold, "dropout_mask")};
  check_launch(launch_dropout_mask(args, current_stream(seed)), "dropout_mask", rows, cols);
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask_cuda));
}

}  // namespace lora_kernels

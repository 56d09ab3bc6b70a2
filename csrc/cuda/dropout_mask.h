#pragma once
#include <cuda_runtime_api.h>

#include "../lora.h"

namespace lora_kernels {

// All pointers in args, the seed included, are device pointers.
cudaError_t launch_dropout_mask(const DropoutMaskArgs& args, cudaStream_t stream);

}  // namespace lora_kernels

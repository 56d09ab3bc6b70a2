// The launcher of decode.cuh.
#pragma once
#include "decode_plan.h"
#include "launch.h"

namespace lora_kernels {

// All pointers in args, the seed included, are device pointers; the device is the current one.
cudaError_t launch_decode(const ForwardArgs& args, const DecodePlan& plan, cudaStream_t stream);

}  // namespace lora_kernels

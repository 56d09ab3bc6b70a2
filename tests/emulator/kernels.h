// The kernels that the emulator runs, as launches that only miss a machine.
#pragma once
#include <vector>

#include "cuda/down_proj_plan.h"
#include "machine.h"

namespace emu {

// What launch_down_proj would launch on such a device; args point into host memory.
std::vector<Launch> down_proj_launches(const lora_kernels::DownProjArgs& args, int compute,
                                       int multiprocessors);

}  // namespace emu

// The CPU kernels as one table per instruction set. A range [begin, end) of rows or columns may be
// cut anywhere that is a multiple of kRowUnit or kColUnit: the results do not depend on the cut, so
// they are the same for every thread count.
#pragma once
#include "../lora.h"

namespace lora_kernels::cpu {

constexpr int64_t kRowUnit =
    48;  // a multiple of the 6 rows of the microkernel and of a mask group's 16
constexpr int64_t kColUnit = 64;  // a cache line of 16-bit elements or more, and 16 mask groups

struct Kernels {
  const char* isa;
  void (*dropout_mask)(const DropoutMaskArgs&, int64_t row_begin, int64_t row_end);
  void (*down_proj)(const DownProjArgs&, int64_t row_begin, int64_t row_end);
  void (*fused_gemm)(const FusedGemmArgs&, int64_t row_begin, int64_t row_end, int64_t col_begin,
                     int64_t col_end);
  void (*weight_grad)(const WeightGradArgs&, int64_t col_begin, int64_t col_end);
};

// The best table for this processor.
const Kernels& kernels();

}  // namespace lora_kernels::cpu

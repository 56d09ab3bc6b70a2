// The CPU kernels as one table per instruction set. A range [begin, end) of rows or columns may be
// cut anywhere that is a multiple of kRowUnit or kColUnit: the results do not depend on the cut, so
// they are the same for every thread count.
#pragma once
#include "../lora.h"

namespace lora_kernels::cpu {

constexpr int64_t kRowUnit =
    48;  // a multiple of the 6 rows of the microkernel and of a mask group's 16
constexpr int64_t kColUnit = 64;  // a cache line of 16-bit elements or more, and 16 mask groups

// What is left of FusedGemmArgs once the vendor has multiplied: y = product + the rest.
struct FusedGemmTailArgs {
  Matrix product;  // the part of the frozen product that starts at (first_row, first_col)
  int64_t first_row, first_col;
  Matrix h;     // [M, r]
  Matrix up;    // [N, r]
  Matrix bias;  // [1, N], data may be null
  Matrix y;     // the same part of y [M, N]; it may be the product itself
  int64_t M, N, r;
  float scale;
  Dropout dropout;
};

struct Kernels {
  const char* isa;
  void (*dropout_mask)(const DropoutMaskArgs&, int64_t row_begin, int64_t row_end);
  void (*down_proj)(const DownProjArgs&, int64_t row_begin, int64_t row_end);
  void (*fused_gemm)(const FusedGemmTailArgs&, int64_t row_begin, int64_t row_end,
                     int64_t col_begin, int64_t col_end);
  void (*weight_grad)(const WeightGradArgs&, int64_t col_begin, int64_t col_end);
};

// The best table for this processor.
const Kernels& kernels();

}  // namespace lora_kernels::cpu

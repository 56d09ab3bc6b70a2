// What a TMA tensor map describes, and its encoding by the driver.
#pragma once
#include <cstdint>

#include "../lora.h"

namespace lora_kernels {

// Rows of 16-bit elements; boxes of 64 columns (kRowElements) by box_rows, 128-byte swizzle, zero
// where a box leaves the matrix. data and row_stride lie on 16-byte boundaries.
struct TensorMapSpec {
  const void* data;
  int64_t columns, rows;
  int64_t row_stride;  // elements
  int box_rows;        // at most 256
  Dtype dtype;
};

}  // namespace lora_kernels

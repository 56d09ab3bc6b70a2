// mask [rows, cols] = keep mask of the window of the global matrix that starts at (row0, col0).
//
// One thread draws one Philox group: 8 elements in rows {g, g+8} and columns {2t, 2t+1, 2t+8, 2t+9}
// of a 16x16 block of the global matrix, as a lane of a tensor-core fragment does. Writes are
// bytes, one per element: 1 byte of traffic each, and about 30 integer operations per element to
// draw it. The training kernels draw the same groups in registers and never store them; this one
// serves lora_kernels.dropout_mask and the tests.
#pragma once
#include "../philox.h"

namespace lora_kernels {

constexpr int kMaskThreads = 256;

__global__ void __launch_bounds__(kMaskThreads) dropout_mask_kernel(const DropoutMaskArgs args) {
  const Dropout& dropout = args.dropout;
  const uint64_t seed = static_cast<uint64_t>(dropout.seed[0]);
  const uint64_t offset = static_cast<uint64_t>(dropout.seed[1]);
  const int64_t first_row = row0(dropout), first_col = col0(dropout);

  // Blocks of 16x16 that the window touches, 32 groups each.
  const int64_t block_row = first_row / 16, block_col = first_col / 16;
  const int64_t block_cols = (first_col + args.cols + 15) / 16 - block_col;
  const int64_t block_rows = (first_row + args.rows + 15) / 16 - block_row;
  const int64_t groups = block_rows * block_cols * 32;

  for (int64_t i = int64_t{blockIdx.x} * kMaskThreads + threadIdx.x; i < groups;
       i += int64_t{gridDim.x} * kMaskThreads) {
    // Neighbouring threads take neighbouring column groups of one row group, so that a warp writes
    // 128 bytes of each of two rows.
    const int64_t column = i % (block_cols * 4), row = i / (block_cols * 4);
    const int64_t global_row = (block_row + row / 8) * 16 + row % 8;
    const int64_t global_col = (block_col + column / 4) * 16 + column % 4 * 2;
    const PhiloxWords words = philox(column_group(global_col), row_group(global_row), offset, seed);
    LK_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int64_t r = global_row + e / 2 % 2 * 8 - first_row;
      const int64_t c = global_col + e / 4 * 8 + e % 2 - first_col;
      const uint32_t bits = words.v[e / 2] >> (16 * (e % 2)) & kMaskBits;
      if (r >= 0 && r < args.rows && c >= 0 && c < args.cols)
        args.mask[r * args.cols + c] = bits >= dropout.threshold;
    }
  }
}

}  // namespace lora_kernels

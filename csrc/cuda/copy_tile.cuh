// Tiles of matrices of any layout, from global into shared memory by all threads of a block.
#pragma once
#include "../lora.h"
#include "ptx.cuh"

namespace lora_kernels {

// A tile in global memory: element (row, col) of it, counted from the matrix's own (0, 0), lies at
// row * row_stride + col * col_stride; rows and cols bound it.
struct TileSource {
  const uint16_t* data;
  int64_t row_stride, col_stride, rows, cols;
  bool vectors;  // rows are contiguous, on 16-byte boundaries
};

// The 8 elements from `from` on, of which `valid` exist.
__device__ __forceinline__ void load_elements(uint32_t (&v)[4], const uint16_t* from,
                                              int64_t stride, int valid) {
  LK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < valid ? ptx::load_global(from + 2 * i * stride) : 0;
    const uint32_t high = 2 * i + 1 < valid ? ptx::load_global(from + (2 * i + 1) * stride) : 0;
    v[i] = low | high << 16;
  }
}

// Rows [row0, row0 + kRows) by 8 kChunks columns from col0 on, zero where the matrix ends: by
// cp.async where there are vectors, else through registers. place(row, chunk) is where a chunk of 8
// elements goes. A thread takes one column of chunks, so its share costs an address and an addition
// each.
template <int kRows, int kChunks, int kThreads, class Place>
__device__ __forceinline__ void load_tile(const TileSource& m, int64_t row0, int64_t col0,
                                          uint32_t thread, const Place& place) {
  static_assert(kThreads % kChunks == 0, "a thread's chunks must lie below one another");
  constexpr int kRowStep = kThreads / kChunks, kSteps = (kRows + kRowStep - 1) / kRowStep;
  const uint32_t row = thread / kChunks, chunk = thread % kChunks;
  const int64_t col = col0 + chunk * 8, left = m.cols - col, first = row0 + row;
  const int valid = left < 0 ? 0 : left > 8 ? 8 : static_cast<int>(left);
  const uint16_t* from = m.data + first * m.row_stride + col * m.col_stride;
  const auto valid_at = [&](int i) { return first + i * kRowStep < m.rows ? valid : 0; };
  const auto at = [&](int i) {
    return valid_at(i) > 0 ? from + i * kRowStep * m.row_stride : m.data;
  };
  if (m.vectors) {
    LK_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t r = row + i * kRowStep;
      if (kRows % kRowStep != 0 && r >= kRows) break;
      ptx::cp_async_16(place(r, chunk), at(i), valid_at(i) * 2);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t r = row + i * kRowStep;
      if (kRows % kRowStep != 0 && r >= kRows) break;
      uint32_t v[4];
      load_elements(v, at(i), m.col_stride, valid_at(i));
      ptx::store_shared_x4(place(r, chunk), v);
    }
  }
}

}  // namespace lora_kernels

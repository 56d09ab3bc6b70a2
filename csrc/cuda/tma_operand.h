// What TMA can address, and what is done about the rest.
#pragma once
#include "../lora.h"
#include "descriptor.h"
#include "tensor_map.h"

namespace lora_kernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a matrix has contiguous rows on 16-byte boundaries.
inline bool has_vectors(const Matrix& m, int64_t rows) {
  return m.col_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         (rows == 1 || m.row_stride % 8 == 0);
}

inline Matrix transposed(const Matrix& m) { return {m.data, m.col_stride, m.row_stride, m.dtype}; }

constexpr int64_t kTmaLimit = int64_t{1} << 31;  // of a coordinate

// A matrix as TMA is to find it: [rows, columns], rows contiguous on 16-byte boundaries. One that
// lies otherwise is copied to the workspace first.
struct TmaOperand {
  Matrix from;
  int64_t rows = 0, columns = 0;
  bool packed = false;  // whether it is copied
  int64_t offset = 0;   // of the copy in the workspace, bytes

  // Of the copy, which is zero past `rows` and `columns`. TMA has no empty matrix.
  int64_t width() const { return columns > 0 ? (columns + 7) / 8 * 8 : 8; }
  int64_t height() const { return rows > 0 ? rows : 1; }
  int64_t bytes() const { return packed ? (height() * width() * 2 + 127) / 128 * 128 : 0; }
  // Where TMA finds it.
  Matrix at(void* workspace) const {
    if (!packed) return from;
    return {static_cast<uint8_t*>(workspace) + offset, width(), 1, from.dtype};
  }
  TensorMapSpec map(void* workspace, int box_rows) const {
    const Matrix m = at(workspace);
    // A single row's stride means nothing, but the driver checks it.
    return {m.data,   packed ? width() : columns,
            height(), rows > 1 ? m.row_stride : width(),
            box_rows, m.dtype};
  }
};

inline TmaOperand tma_operand(const Matrix& m, int64_t rows, int64_t columns) {
  const bool good =
      has_vectors(m, rows) && (rows == 1 || m.row_stride >= columns) && rows > 0 && columns > 0;
  return {m, rows, columns, !good, 0};
}

}  // namespace lora_kernels

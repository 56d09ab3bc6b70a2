// Tiles of an operand in fp32: converted, masked, contiguous.

template <class T>
inline void convert_rows(const T* from, int64_t row_stride, int64_t col_stride, int64_t rows,
                         int64_t cols, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from + i * row_stride;
    float* out = to + i * ld;
    if (col_stride == 1) {
      for (int64_t j = 0; j < cols; ++j) out[j] = to_float(row[j]);
    } else {
      for (int64_t j = 0; j < cols; ++j) out[j] = to_float(row[j * col_stride]);
    }
  }
}

inline void read_tile(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols,
                      float* to, int64_t ld) {
  with_type(m.dtype, [&](auto* type) {
    auto* from = static_cast<decltype(type)>(m.data) + row * m.row_stride + col * m.col_stride;
    convert_rows(from, m.row_stride, m.col_stride, rows, cols, to, ld);
  });
}

// Drops by selecting, never by multiplying: an Inf or NaN under a dropped element vanishes.
inline void drop(const Dropout& dropout, int64_t row, int64_t col, int64_t rows, int64_t cols,
                 float* tile, int64_t ld) {
  constexpr int64_t kStrip = 256;
  uint8_t keep[16 * kStrip];
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < cols; j += kStrip) {
      const int64_t h = min(16, rows - i), w = min(kStrip, cols - j);
      mask_window(dropout, row + i, col + j, h, w, keep, kStrip);
      for (int64_t r = 0; r < h; ++r) {
        float* out = tile + (i + r) * ld + j;
        for (int64_t c = 0; c < w; ++c) out[c] = keep[r * kStrip + c] ? out[c] : 0.0f;
      }
    }
}

// A tile as the microkernel reads it: in place where x is fp32, row-major and undropped.
struct TileView {
  const float* data;
  int64_t ld;
};
inline TileView open_tile(const Matrix& x, const Dropout& dropout, int64_t row, int64_t col,
                          int64_t rows, int64_t cols, float* buffer, int64_t ld) {
  if (x.dtype == Dtype::f32 && x.col_stride == 1 && dropout.seed == nullptr)
    return {static_cast<const float*>(x.data) + row * x.row_stride + col, x.row_stride};
  read_tile(x, row, col, rows, cols, buffer, ld);
  if (dropout.seed != nullptr) drop(dropout, row, col, rows, cols, buffer, ld);
  return {buffer, ld};
}

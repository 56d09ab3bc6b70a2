// acc [rows, cols] += a [rows, depth] * b [depth, cols], the product that all three kernels share.
// b has its columns contiguous and padded to a multiple of kLanes; a has any strides.

constexpr int64_t kPanel =
    2 * kLanes;               // columns held in registers: 6 x 2 accumulators, 2 of b, 1 of a
constexpr int64_t kRows = 6;  // fill the 16 vector registers of AVX2

template <int Rows, int Vecs>
inline void multiply_block(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                           int64_t ldb, int64_t depth, float* acc, int64_t ldacc) {
  Vec sum[Rows][Vecs] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[Vecs];
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) bv[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const float av = a[i * a_row + k * a_depth];
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) sum[i][v] += av * bv[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) {
      float* out = acc + i * ldacc + v * kLanes;
      store(out, load(out) + sum[i][v]);
    }
}

template <int Vecs>
inline void multiply_panel(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                           int64_t ldb, int64_t rows, int64_t depth, float* acc, int64_t ldacc) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply_block<kRows, Vecs>(a + i * a_row, a_row, a_depth, b, ldb, depth, acc + i * ldacc,
                                ldacc);
  a += i * a_row, acc += i * ldacc;
  switch (rows - i) {
    case 5: return multiply_block<5, Vecs>(a, a_row, a_depth, b, ldb, depth, acc, ldacc);
    case 4: return multiply_block<4, Vecs>(a, a_row, a_depth, b, ldb, depth, acc, ldacc);
    case 3: return multiply_block<3, Vecs>(a, a_row, a_depth, b, ldb, depth, acc, ldacc);
    case 2: return multiply_block<2, Vecs>(a, a_row, a_depth, b, ldb, depth, acc, ldacc);
    case 1: return multiply_block<1, Vecs>(a, a_row, a_depth, b, ldb, depth, acc, ldacc);
  }
}

// to [depth, ld] = rows [first, first + count) of m, transposed and padded with zeros. Depth runs
// in the outer loop: a transposed view (B^T in backward) is then a copy, and other layouts are read
// as `count` streams and written in order.
template <class T>
inline void pack_rows(const T* from, int64_t row_stride, int64_t col_stride, int64_t count,
                      int64_t depth, float* to, int64_t ld) {
  for (int64_t k = 0; k < depth; ++k) {
    const T* column = from + k * col_stride;
    float* out = to + k * ld;
    if (row_stride == 1) {
      for (int64_t i = 0; i < count; ++i) out[i] = to_float(column[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = to_float(column[i * row_stride]);
    }
    for (int64_t i = count; i < ld; ++i) out[i] = 0.0f;
  }
}

inline void pack_transposed(const Matrix& m, int64_t first, int64_t count, int64_t depth_begin,
                            int64_t depth, float* to, int64_t ld) {
  with_type(m.dtype, [&](auto* type) {
    auto* from =
        static_cast<decltype(type)>(m.data) + first * m.row_stride + depth_begin * m.col_stride;
    pack_rows(from, m.row_stride, m.col_stride, count, depth, to, ld);
  });
}

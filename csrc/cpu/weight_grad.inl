// grad [r, K] = scale * h^T * dropout(x). Columns of x are independent, so threads share them and
// no partial sums are exchanged; each column adds up chunks of 128 rows in order.

inline void weight_grad_chunk(const WeightGradArgs& a, int64_t col, int64_t cols,
                              int64_t rank_begin, int64_t rank) {
  constexpr int64_t kChunk = 128, kCols = 4 * kColUnit, kRank = 128;
  float tile[kChunk * kCols], h[kChunk * kRank], acc[kRank * kCols];
  const int64_t ld = round_up(cols, kPanel);
  fill_zero(acc, rank * ld);

  for (int64_t row = 0; row < a.M; row += kChunk) {
    const int64_t rows = min(kChunk, a.M - row);
    // The microkernel reads whole vectors: only full panels may be read in place.
    const bool whole = cols % kPanel == 0;
    TileView x{tile, ld};
    if (whole) {
      x = open_tile(a.x, a.dropout, row, col, rows, cols, tile, ld);
    } else {
      fill_zero(tile, rows * ld);
      read_tile(a.x, row, col, rows, cols, tile, ld);
      if (a.dropout.seed != nullptr) drop(a.dropout, row, col, rows, cols, tile, ld);
    }
    read_tile(a.h, row, rank_begin, rows, rank, h, rank);
    for (int64_t j = 0; j < cols; j += kPanel)
      multiply_panel<2>(h, 1, rank, x.data + j, x.ld, rank, rows, acc + j, ld);
  }
  with_type(a.grad.dtype, [&](auto* type) {
    auto* grad = static_cast<decltype(type)>(a.grad.data);
    for (int64_t i = 0; i < rank; ++i)
      for (int64_t j = 0; j < cols; ++j)
        from_float(a.scale * acc[i * ld + j],
                   grad[(rank_begin + i) * a.grad.row_stride + (col + j) * a.grad.col_stride]);
  });
}

inline void weight_grad(const WeightGradArgs& a, int64_t col_begin, int64_t col_end) {
  for (int64_t rank = 0; rank < a.r; rank += 128)
    for (int64_t col = col_begin; col < col_end; col += 4 * kColUnit)
      weight_grad_chunk(a, col, min(4 * kColUnit, col_end - col), rank, min(128, a.r - rank));
}

// y [M, N] = product + select(mask, scale * h * up^T, 0) + bias: the epilogue of the frozen GEMM.
// The frozen product comes from the vendor's library; where that is fp32, this pass adds the rank-r
// term while it rounds, so y is rounded once. Up projections are packed for as many columns as fit
// the L1 or L2.

template <class Product, class Y>
void epilogue_rows(const FusedGemmTailArgs& a, int64_t row, int64_t rows, int64_t col, int64_t cols,
                   const float* lora, int64_t ld, const float* bias, const Product* products,
                   Y* ys) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = row + i - a.first_row, c = col - a.first_col;
    const Product* product = products + r * a.product.row_stride + c;
    Y* y = ys + r * a.y.row_stride + c;
    for (int64_t j = 0; j < cols; ++j)
      from_float(to_float(product[j]) + (a.scale * lora[i * ld + j] + bias[j]), y[j]);
  }
}

inline void epilogue_strip(const FusedGemmTailArgs& a, int64_t row, int64_t rows, int64_t col,
                           int64_t cols, const float* lora, int64_t ld) {
  float bias[kColUnit] = {};
  if (a.bias.data != nullptr) read_tile(a.bias, 0, col, 1, cols, bias, kColUnit);
  with_type(a.product.dtype, [&](auto* from) {
    with_type(a.y.dtype, [&](auto* to) {
      epilogue_rows(a, row, rows, col, cols, lora, ld, bias,
                    static_cast<decltype(from)>(a.product.data),
                    static_cast<decltype(to)>(a.y.data));
    });
  });
}

inline void fused_gemm(const FusedGemmTailArgs& a, int64_t row_begin, int64_t row_end,
                       int64_t col_begin, int64_t col_end) {
  constexpr int64_t kRowBlock = 48, kRank = 128, kPacked = 1 << 15;
  float h[kRowBlock * kRank], packed[kPacked], lora[kRowBlock * kColUnit];
  const int64_t depth = min(max(a.r, 1), kRank);
  const int64_t strip = kPacked / depth / kColUnit * kColUnit;

  for (int64_t left = col_begin; left < col_end; left += strip) {
    const int64_t right = min(left + strip, col_end);
    for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
      const int64_t rows = min(kRowBlock, row_end - row);
      // 64 columns at a time: the width in which the mask is drawn.
      for (int64_t col = left; col < right; col += kColUnit) {
        const int64_t cols = min(kColUnit, right - col), ld = round_up(cols, kPanel);
        fill_zero(lora, rows * ld);
        for (int64_t k = 0; k < a.r; k += kRank) {
          const int64_t ranks = min(kRank, a.r - k);
          // Ranks up to 128 are packed once a strip; beyond, once for each 64 columns.
          const bool once = a.r <= kRank;
          float* panels = once ? packed + (col - left) * depth : packed;
          if (!once || col == left) read_tile(a.h, row, k, rows, ranks, h, kRank);
          for (int64_t j = 0; j < cols; j += kPanel) {
            float* panel = panels + j * ranks;
            if (!once || row == row_begin)
              pack_transposed(a.up, col + j, min(kPanel, cols - j), k, ranks, panel, kPanel);
            multiply_panel<2>(h, kRank, 1, panel, kPanel, rows, ranks, lora + j, ld);
          }
        }
        if (a.dropout.seed != nullptr) drop(a.dropout, row, col, rows, cols, lora, ld);
        epilogue_strip(a, row, rows, col, cols, lora, ld);
      }
    }
  }
}

// keep [rows, cols] of the mask at (row, col) of x, one byte an element, 1 = kept.
// Drawn in blocks of 16 rows by 64 columns of the *global* matrix, and cut to the window.
inline void mask_window(const Dropout& dropout, int64_t row, int64_t col, int64_t rows,
                        int64_t cols, uint8_t* keep, int64_t ld) {
  constexpr int kGroups = 16, kWidth = 64;
  const uint64_t seed = static_cast<uint64_t>(dropout.seed[0]);
  const uint64_t offset = static_cast<uint64_t>(dropout.seed[1]);
  const uint32_t threshold = dropout.threshold;
  const int64_t row_begin = row0(dropout) + row, row_end = row_begin + rows;
  const int64_t col_begin = col0(dropout) + col, col_end = col_begin + cols;

  for (int64_t block_row = row_begin & ~int64_t{15}; block_row < row_end; block_row += 16) {
    for (int64_t block_col = col_begin & ~int64_t{63}; block_col < col_end; block_col += kWidth) {
      alignas(64) uint8_t block[16][kWidth];
      for (int g = 0; g < 8; ++g) {
        // pairs[v][lane]: word v of a group as two bytes, those of four lanes being 8 columns in a
        // row
        alignas(64) uint16_t pairs[4][kGroups];
        const uint32_t rows_of = row_group(block_row + g), cols_of = column_group(block_col);
        for (int lane = 0; lane < kGroups; ++lane) {
          PhiloxWords w = philox(cols_of + lane, rows_of, offset, seed);
          for (int v = 0; v < 4; ++v) {
            uint32_t low = (w.v[v] & kMaskBits) >= threshold;
            uint32_t high = (w.v[v] >> 16 & kMaskBits) >= threshold;
            pairs[v][lane] = static_cast<uint16_t>(low | high << 8);
          }
        }
        for (int v = 0; v < 4; ++v)
          for (int fragment = 0; fragment < kWidth / 16; ++fragment)
            std::memcpy(&block[g + v % 2 * 8][fragment * 16 + v / 2 * 8], &pairs[v][fragment * 4],
                        8);
      }
      const int64_t first_row = max(block_row, row_begin);
      const int64_t last_row = min(block_row + 16, row_end);
      const int64_t first_col = max(block_col, col_begin);
      const int64_t last_col = min(block_col + kWidth, col_end);
      for (int64_t r = first_row; r < last_row; ++r)
        std::memcpy(keep + (r - row_begin) * ld + (first_col - col_begin),
                    &block[r - block_row][first_col - block_col], last_col - first_col);
    }
  }
}

inline void dropout_mask(const DropoutMaskArgs& a, int64_t row_begin, int64_t row_end) {
  if (row_end > row_begin && a.cols > 0)
    mask_window(a.dropout, row_begin, 0, row_end - row_begin, a.cols,
                reinterpret_cast<uint8_t*>(a.mask) + row_begin * a.cols, a.cols);
}

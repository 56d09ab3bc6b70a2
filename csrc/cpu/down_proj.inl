// h [M, r] = scale * dropout(x) * down^T, one pass over x for every 256 ranks.
// A block of 96 rows by 256 columns of x is converted and masked once, in the L2 cache, and meets
// panels of down that were packed once for the block.

inline void down_proj_chunk(const DownProjArgs& a, int64_t row_begin, int64_t row_end,
                            int64_t rank_begin, int64_t rank) {
  constexpr int64_t kRowBlock = 96, kDepth = 256, kRank = 256;
  float tile[kRowBlock * kDepth], panel[kDepth * kPanel], acc[kRowBlock * kRank];
  const int64_t ld = round_up(rank, kLanes);

  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t rows = min(kRowBlock, row_end - row);
    fill_zero(acc, rows * ld);
    for (int64_t k = 0; k < a.K; k += kDepth) {
      const int64_t depth = min(kDepth, a.K - k);
      const TileView x = open_tile(a.x, a.dropout, row, k, rows, depth, tile, kDepth);
      for (int64_t j = 0; j < ld; j += kPanel) {
        const int64_t width = min(kPanel, ld - j), count = min(width, rank - j);
        pack_transposed(a.down, rank_begin + j, count, k, depth, panel, width);
        auto multiply = width == kPanel ? multiply_panel<2> : multiply_panel<1>;
        multiply(x.data, x.ld, 1, panel, width, rows, depth, acc + j, ld);
      }
    }
    with_type(a.h.dtype, [&](auto* type) {
      auto* h = static_cast<decltype(type)>(a.h.data);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < rank; ++j)
          from_float(a.scale * acc[i * ld + j],
                     h[(row + i) * a.h.row_stride + (rank_begin + j) * a.h.col_stride]);
    });
  }
}

inline void down_proj(const DownProjArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t rank = 0; rank < a.r; rank += 256)
    down_proj_chunk(a, row_begin, row_end, rank, min(256, a.r - rank));
}

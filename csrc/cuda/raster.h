// The order in which a persistent grid goes through its work.
//
// y is a table of tiles: a row for every pair of row blocks (the two blocks of a cluster take one
// each), a column for every tile of columns. Groups of rows are finished one after another, column
// by column, so that the tiles of a wave share x and W in L2.
//
// A grid that also makes h has chains of work before those tiles: a chain is h of a few pairs,
// about as long as a tile, so that the fewest clusters lose a turn to it. All chains come first if
// few clusters make them; else those of a group come before its tiles, lest all clusters wait for
// memory at once. Either way h of a pair has a smaller number than every tile that reads it.
#pragma once
#include <cstdint>

#include "descriptor.h"

namespace lora_kernels {

// An item of work: a tile of y, or h of `count` pairs from `pair` on.
struct RasterPlace {
  bool is_h;
  uint32_t pair, column, count;
};

struct Raster {
  uint32_t pairs, columns;
  uint32_t group;      // pairs; the last group may have fewer
  uint32_t chain = 0;  // pairs of a chain; 0: no h here
  bool chains_first = false;

  LK_SHARED_FUNCTION uint32_t chains_of(uint32_t rows) const {
    return chain == 0 ? 0 : (rows + chain - 1) / chain;
  }
  LK_SHARED_FUNCTION uint32_t chains() const {
    if (chains_first) return chains_of(pairs);
    return pairs / group * chains_of(group) + chains_of(pairs % group);
  }
  LK_SHARED_FUNCTION uint32_t items() const { return pairs * columns + chains(); }

  LK_SHARED_FUNCTION RasterPlace place(uint32_t item) const {
    const uint32_t leading = chains_first ? chains_of(pairs) : 0;
    if (item < leading) return chain_at(0, pairs, item);
    item -= leading;
    const uint32_t ahead = chains_first ? 0 : chains_of(group);
    const uint32_t before = item / (group * columns + ahead);
    const uint32_t first = before * group;
    const uint32_t rows = pairs - first < group ? pairs - first : group;
    const uint32_t own = chains_first ? 0 : chains_of(rows);
    const uint32_t i = item - before * (group * columns + ahead);
    if (i < own) return chain_at(first, rows, i);
    return {false, first + (i - own) % rows, (i - own) / rows, 1};
  }

 private:
  LK_SHARED_FUNCTION RasterPlace chain_at(uint32_t first, uint32_t rows, uint32_t i) const {
    const uint32_t left = rows - i * chain;
    return {true, first + i * chain, 0, left < chain ? left : chain};
  }
};

}  // namespace lora_kernels

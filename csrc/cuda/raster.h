// The order in which a persistent grid goes through its work.
//
// Work lies in a table: a row for every pair of row blocks of y (the two blocks of a cluster take
// one each), a column for every tile of y's columns. Groups of rows are finished one after another,
// column by column, so that the tiles of a wave share x and W in L2.
#pragma once
#include <cstdint>

#include "descriptor.h"

namespace lora_kernels {

struct RasterPlace {
  uint32_t pair, column;
};

struct Raster {
  uint32_t pairs, columns;
  uint32_t group;  // pairs; the last group may have fewer

  LK_SHARED_FUNCTION uint32_t items() const { return pairs * columns; }
  LK_SHARED_FUNCTION RasterPlace place(uint32_t item) const {
    const uint32_t first = item / (group * columns) * group;
    const uint32_t size = pairs - first < group ? pairs - first : group;
    const uint32_t i = item - first * columns;
    return {first + i % size, i / size};
  }
};

}  // namespace lora_kernels

// The order in which one grid goes through the backward pass.
//
//   dy      dh and partial results of dB, over 512 rows of dy: the chains of Raster
//   dx      tiles, which read dh of their rows
//   sum_b   adds partial results of dB
//   x       partial results of dA, over 512 rows and a slice of the columns of x
//   sum_a   adds those of a slice; comes a slice late, so that it seldom waits
//
// Whatever an item reads is made by items of smaller numbers. Items of x trail the tiles of the
// group behind theirs, so that reading x hides behind products. Those of the last group come last,
// being small: they fill what the tiles leave of the last wave.
#pragma once
#include "raster.h"

namespace lora_kernels {

enum class BackwardItem : uint32_t { dy, dx, sum_b, x, sum_a };

struct BackwardPlace {
  BackwardItem what;
  RasterPlace tile;  // of dy and dx
  uint32_t slice;    // of x and sum_a
  uint32_t index;    // of x: the chunk of rows; of sums: which of them
};

struct BackwardOrder {
  static constexpr uint32_t kChunkPairs = 2;  // 512 rows
  Raster raster;  // groups are even, chains are chunks, and x trails in all slices of a group
  uint32_t sums_b;
  uint32_t slices, sums_a;  // items for each slice

  LK_SHARED_FUNCTION uint32_t chunks() const {
    return (raster.pairs + kChunkPairs - 1) / kChunkPairs;
  }
  LK_SHARED_FUNCTION uint32_t items() const {
    return raster.items() + sums_b + slices * (last_chunks() + sums_a);
  }
  LK_SHARED_FUNCTION BackwardPlace place(uint32_t item) const {
    if (item < raster.items()) {
      const RasterPlace tile = raster.place(item);
      if (tile.trails) {
        const uint32_t of_group = raster.group / kChunkPairs, first = tile.pair / kChunkPairs;
        return {BackwardItem::x, {}, tile.column / of_group, first + tile.column % of_group};
      }
      return {tile.is_h ? BackwardItem::dy : BackwardItem::dx, tile, 0, 0};
    }
    item -= raster.items();
    if (item < sums_b) return {BackwardItem::sum_b, {}, 0, item};
    item -= sums_b;
    const uint32_t count = last_chunks(), first = chunks() - count;
    if (item < count) return {BackwardItem::x, {}, 0, first + item};
    item -= count;
    const uint32_t turn = count + sums_a, slice = 1 + item / turn, index = item % turn;
    if (slice < slices && index < count) return {BackwardItem::x, {}, slice, first + index};
    return {BackwardItem::sum_a, {}, slice - 1, slice < slices ? index - count : index};
  }
  // Of the last group.
  LK_SHARED_FUNCTION uint32_t last_chunks() const {
    return chunks() - (raster.groups() - 1) * (raster.group / kChunkPairs);
  }
};

}  // namespace lora_kernels

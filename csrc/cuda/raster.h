// The order in which a persistent grid goes through its work.
//
// y is a table of tiles: a row for every pair of row blocks (the two blocks of a cluster take one
// each), a column for every tile of columns. Groups of rows are finished one after another, column
// by column, so that the tiles of a wave share x and W in L2.
//
// A grid that also makes h has chains of work before those tiles: a chain is h of a few pairs,
// about as long as a tile, so that the fewest clusters lose a turn to it. All chains come first if
// few clusters make them; else those of a group come before the tiles of the group before, lest all
// clusters wait for memory at once, and lest the first tiles of a group wait for its h. Either way
// h of a pair has a smaller number than every tile that reads it.
//
// A grid that has more work for rows whose tiles are done has trailing items: as many behind the
// tiles of each group but the first, for the rows of the group before.
#pragma once
#include <cstdint>

#include "descriptor.h"

namespace lora_kernels {

// An item of work: a tile of y, or h of `count` pairs from `pair` on; or a trailing item, number
// `column` of those for the group that begins with `pair`.
struct RasterPlace {
  bool is_h;
  uint32_t pair, column, count;
  bool trails = false;
};

struct Raster {
  uint32_t pairs = 0, columns = 0;
  uint32_t group = 0;  // pairs; the last group may have fewer
  uint32_t chain = 0;  // pairs of a chain; 0: no h here
  bool chains_first = false;
  uint32_t trail = 0;  // trailing items of a group

  Raster() = default;
  Raster(uint32_t pairs_, uint32_t columns_, uint32_t group_, uint32_t chain_ = 0,
         bool chains_first_ = false, uint32_t trail_ = 0)
      : pairs(pairs_),
        columns(columns_),
        group(group_),
        chain(chain_),
        chains_first(chains_first_),
        trail(trail_),
        groups_((pairs + group - 1) / group),
        chains_of_group_(chains_of(group)),
        chains_of_last_(chains_of(pairs - (groups_ - 1) * group)),
        leading_(chains_first  ? chains_of(pairs)
                 : groups_ > 1 ? chains_of_group_
                               : chains_of_last_),
        items_(pairs * columns + (groups_ - 1) * trail +
               (chains_first ? leading_ : (groups_ - 1) * chains_of_group_ + chains_of_last_)) {}

  LK_SHARED_FUNCTION uint32_t items() const { return items_; }
  LK_SHARED_FUNCTION uint32_t chains() const {
    return items_ - pairs * columns - (groups_ - 1) * trail;
  }
  LK_SHARED_FUNCTION uint32_t groups() const { return groups_; }

  LK_SHARED_FUNCTION RasterPlace place(uint32_t item) const {
    if (item < leading_) return chain_at(0, chains_first ? pairs : rows_of(0), item);
    item -= leading_;
    // From here on, for each group: chains of the next one, its own tiles, what trails the one
    // before. All but the last two groups have as many of each.
    const uint32_t before_last = groups_ > 1 ? groups_ - 2 : 0;
    const uint32_t each = group * columns + (chains_first ? 0 : chains_of_group_) + trail;
    if (item >= chains_ahead(0) + rows_of(0) * columns) item += trail;  // the first has none
    uint32_t at = item / each;
    at = at < before_last ? at : before_last;
    item -= at * each;
    const uint32_t own = chains_ahead(at) + rows_of(at) * columns + trail;
    if (item >= own) {
      item -= own;
      ++at;
    }
    const uint32_t ahead = chains_ahead(at), rows = rows_of(at);
    if (item < ahead) return chain_at((at + 1) * group, rows_of(at + 1), item);
    item -= ahead;
    if (item >= rows * columns) return {false, (at - 1) * group, item - rows * columns, 1, true};
    return {false, at * group + item % rows, item / rows, 1};
  }

 private:
  // What place() would else divide for.
  uint32_t groups_ = 0, chains_of_group_ = 0, chains_of_last_ = 0;
  uint32_t leading_ = 0;  // chains before all else
  uint32_t items_ = 0;

  uint32_t chains_of(uint32_t rows) const { return chain == 0 ? 0 : (rows + chain - 1) / chain; }
  LK_SHARED_FUNCTION uint32_t rows_of(uint32_t number) const {
    return number + 1 < groups_ ? group : pairs - number * group;
  }
  // Those of the next group.
  LK_SHARED_FUNCTION uint32_t chains_ahead(uint32_t number) const {
    if (chains_first || number + 1 >= groups_) return 0;
    return number + 2 == groups_ ? chains_of_last_ : chains_of_group_;
  }
  LK_SHARED_FUNCTION RasterPlace chain_at(uint32_t first, uint32_t rows, uint32_t i) const {
    const uint32_t left = rows - i * chain;
    return {true, first + i * chain, 0, left < chain ? left : chain};
  }
};

}  // namespace lora_kernels

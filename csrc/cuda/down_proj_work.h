// What down_proj_sm90 is told, from arguments and plan.
#pragma once
#include "down_proj_plan.h"

namespace lora_kernels {

struct DownProjWork {
  DownProjArgs each[kMaxGroup];  // one x, M and K
  DownProjPlace place[kMaxGroup];
  int count;
  uint32_t parts;
};
template <class Map>
struct DownProjMaps {
  Map down[kMaxGroup];
};
constexpr int kMapBytes = 128;
static_assert(sizeof(DownProjWork) + (1 + kMaxGroup) * kMapBytes <= 4096,
              "a launch takes 4 KB of parameters");

inline DownProjWork work_of(const DownProjArgs* each, int count, const DownProjGroupPlan& plan) {
  DownProjWork work{};
  for (int i = 0; i < count; ++i) {
    work.each[i] = each[i];
    work.place[i] = plan.place[i];
  }
  work.count = count;
  work.parts = static_cast<uint32_t>(plan.tile.rank_blocks);
  return work;
}

// A block's ranks: those from `rank` on of projections [first, last).
struct DownProjShare {
  int first, last;
  int64_t rank;
};
// Projections lie in order of their parts, and one of several parts lies in them alone.
LK_SHARED_FUNCTION DownProjShare share_of(const DownProjWork& work, int64_t part, int tile_rank) {
  int last = 1;
  while (last < work.count && work.place[last].part <= part) ++last;
  int first = last - 1;
  const int64_t begin = work.place[first].part;
  while (first > 0 && work.place[first - 1].part == begin) --first;
  return {first, last, (part - begin) * tile_rank};
}

}  // namespace lora_kernels

// Vector clocks: which events are ordered before which, whatever the emulated timing was.
//
//// An agent is whatever completes its events in order: a warp; beside it the reads and the writes
/// of
// its bulk stores and its cp.async groups; the tensor cores of a warpgroup (wgmma groups); and each
// mbarrier, whose phases complete the TMA loads that count on it. An event is a stamp (agent,
// number). The lanes of a warp are one agent: what one lane knows, the others count as knowing.
#pragma once
#include <cstdint>
#include <vector>

namespace emu {

struct Stamp {
  uint32_t agent = 0;
  uint32_t number = 0;  // 0: before the launch
};

class Clock {
 public:
  uint32_t operator[](uint32_t agent) const { return agent < seen_.size() ? seen_[agent] : 0; }
  void advance(uint32_t agent, uint32_t number) {
    if (agent >= seen_.size()) seen_.resize(agent + 1);
    if (seen_[agent] < number) seen_[agent] = number;
  }
  void join(const Clock& other) {
    if (other.seen_.size() > seen_.size()) seen_.resize(other.seen_.size());
    for (size_t i = 0; i < other.seen_.size(); ++i)
      seen_[i] = seen_[i] < other.seen_[i] ? other.seen_[i] : seen_[i];
  }
  bool covers(Stamp s) const { return s.number <= (*this)[s.agent]; }

 private:
  std::vector<uint32_t> seen_;
};

enum class Space { shared, global };

// What an agent knows: events ordered before it, and those of them that are also ordered for the
// async proxy, because a proxy fence for their space followed the write in the writing thread.
struct Knowledge {
  Clock generic, fenced[2];
  Clock& async(Space s) { return fenced[static_cast<int>(s)]; }
  const Clock& async(Space s) const { return fenced[static_cast<int>(s)]; }
  void join(const Knowledge& other) {
    generic.join(other.generic);
    for (int i = 0; i < 2; ++i) fenced[i].join(other.fenced[i]);
  }
};

}  // namespace emu

// Vector clocks: which events are ordered before which, whatever the emulated timing was.
//
// An agent is whatever completes its events in order: a warp, and beside it its tensor core (wgmma
// groups), the reads and the writes of its bulk stores, its cp.async groups; and each mbarrier,
// whose phases complete the TMA loads that count on it. An event is a stamp (agent, number).
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

// What an agent knows: events ordered before it, and those of them that are also ordered for the
// async proxy, because a proxy fence of the writing warp follows the write.
struct Knowledge {
  Clock generic, async;
  void join(const Knowledge& other) {
    generic.join(other.generic);
    async.join(other.async);
  }
};

}  // namespace emu

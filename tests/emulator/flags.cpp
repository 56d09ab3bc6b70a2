// Proxy fences, flags in global memory, registers and dependent launches.
#include <algorithm>

#include "async.h"

namespace emu {

// ---- fences and flags ---------------------------------------------------------------------------

// What a fence orders: what its own warp wrote, as soon as every lane that wrote has fenced, and
// its cp.async; in global memory also what others had fenced before they told. So a write that TMA
// of another block reads needs a fence on both sides. (The memory model's text would let a fence
// anywhere between suffice; CUTLASS and the CUDA guide fence in the writers, as is asked for here.)
void fence_proxy(Space space) {
  Warp& w = warp();
  Clock& async = w.known.async(space);
  uint32_t& unfenced = w.unfenced[static_cast<int>(space)];
  unfenced &= ~(1u << self().lane);
  if (unfenced == 0) {
    async.advance(w.agent, w.known.generic[w.agent]);
    w.known.generic.advance(w.agent, w.known.generic[w.agent] + 1);
  }
  async.advance(w.agent + kCopy, w.known.generic[w.agent + kCopy]);
  if (space == Space::global) {
    async.join(w.foreign);
    return;
  }
  for (auto& [address, b] : block().shared->barriers)
    if (b.init.agent == w.agent) b.fenced_here = true;
}

// A thread that keeps reading flags while nobody writes one waits until somebody does: a spin loop
// then neither hangs nor hides a deadlock.
uint32_t acquire_flag(const uint32_t* flag, Place at) {
  constexpr int kPatience = 400;
  Knowledge& knowledge = global.flag(flag, "ld.acquire", at);
  Thread& t = self();
  const bool known = t.polled == flag && t.polled_news == machine->news;
  if (t.polled_news != machine->news) t.idle_polls = 0;
  t.polled = flag;
  t.polled_news = machine->news;
  if (++t.idle_polls > kPatience)
    machine->wait_until("a flag", at, [&] { return t.polled_news != machine->news; });
  if (known && t.polled_news == machine->news) return *flag;
  Warp& w = warp();
  w.known.generic.join(knowledge.generic);
  w.known.async(Space::shared).join(knowledge.async(Space::shared));
  w.foreign.join(knowledge.async(Space::global));
  return *flag;
}

void release_flag(uint32_t* flag, uint32_t value, Place at) {
  Knowledge& knowledge = global.flag(flag, "st.release", at);
  knowledge = {};
  release(warp(), knowledge);
  *flag = value;
  ++machine->news;
}

// An addition leaves what others had released into the counter in place.
void add_release(uint32_t* counter, uint32_t value, Place at) {
  release(warp(), global.flag(counter, "red.release", at));
  *counter += value;
  ++machine->news;
}

uint32_t add_to(uint32_t* counter, uint32_t value, Place at) {
  global.flag(counter, "atom.add", at);
  const uint32_t before = *counter;
  *counter = before + value;
  ++machine->news;
  return before;
}

// ---- registers and dependent launches -----------------------------------------------------------

void change_registers(int registers, bool increase, Place at) {
  if (registers < 24 || registers > 256 || registers % 8)
    machine->fail("setmaxnreg " + std::to_string(registers), at);
  Block& b = block();
  Warp& w = warp();
  const int threads = static_cast<int>(b.grid->launch->threads);
  if (w.registers == 0) w.registers = std::min(255, 65536 / threads / 8 * 8);
  struct {
  } none;
  const int wanted = 32 * (registers - w.registers);
  if (increase)
    machine->wait_until("free registers", at, [&] { return b.free_registers >= wanted; });
  machine->collective("setmaxnreg", at, &none, [&](auto&) {
    if ((wanted > 0) != increase)
      machine->fail("setmaxnreg." + std::string(increase ? "inc" : "dec") + " from " +
                        std::to_string(w.registers) + " to " + std::to_string(registers),
                    at);
    b.free_registers -= wanted;
    w.registers = registers;
  });
}

void launch_dependents() {
  Block& b = block();
  if (!b.launched_dependents) ++b.grid->blocks_released;
  b.launched_dependents = true;
}

void wait_dependency(Place at) {
  const int after = block().grid->launch->after;
  if (after < 0) return;
  Grid& before = machine->grids()[after];
  machine->wait_until("the kernel before", at, [&] { return before.complete(); });
  block().grid->waited = true;
  acquire(warp(), before.finished);
}

}  // namespace emu

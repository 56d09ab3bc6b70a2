#include "async.h"

#include <algorithm>

namespace emu {

// ---- named and cluster barriers -----------------------------------------------------------------

void complete_if_gathered(NamedBarrier& b, const Block& of) {
  const unsigned exited = b.whole_block ? static_cast<unsigned>(of.warps_done) * 32 : 0;
  if (b.arrived + exited < b.expected) return;
  b.released = b.gathering;
  b.gathering = {};
  b.arrived = 0;
  ++b.generation;
}

void complete_if_gathered(ClusterState& c) {
  if (c.arrived == 0 || c.arrived < c.expected) return;
  c.arrived = 0;
  c.released = c.gathering;
  c.gathering = {};
  ++c.generation;
}

void sync_named(int id, unsigned threads, bool waits, Place at) {
  const bool whole_block = threads == kWholeBlock;
  if (whole_block) threads = block().grid->launch->threads;
  if (id < 0 || id > 15 || threads % 32 || threads == 0)
    machine->fail(
        "barrier misuse: bar " + std::to_string(id) + " of " + std::to_string(threads) + " threads",
        at);
  NamedBarrier& b = block().named[id];
  uint64_t generation = 0;
  // Warps arrive as a whole: bar.sync is a warp's instruction.
  machine->collective("bar.sync", at, &generation, [&](auto& generations) {
    if (b.arrived > 0 && b.expected != threads)
      machine->fail("barrier misuse: bar " + std::to_string(id) + " of " + std::to_string(threads) +
                        " threads, but others gather there for " + std::to_string(b.expected),
                    at);
    if (b.always != 0 && b.always != threads)
      machine->fail("barrier misuse: bar " + std::to_string(id) + " of " + std::to_string(threads) +
                        " threads was one of " + std::to_string(b.always) + " before",
                    at);
    b.expected = b.always = threads;
    b.whole_block = whole_block;
    b.arrived += 32;
    if (b.arrived > threads)
      machine->fail("barrier misuse: more threads at bar " + std::to_string(id) + " than its " +
                        std::to_string(threads),
                    at);
    release(warp(), b.gathering);
    for (uint64_t* of_lane : generations) *of_lane = b.generation;
    complete_if_gathered(b, block());
  });
  if (!waits) return;
  machine->wait_until("a named barrier", at, [&] { return b.generation != generation; });
  acquire(warp(), b.released);
}

void arrive_cluster(Place at) {
  ClusterState& c = *block().cluster;
  struct {
  } none;
  machine->collective("barrier.cluster.arrive", at, &none, [&](auto&) {
    if (warp().in_cluster_arrival)
      machine->fail("barrier misuse: barrier.cluster.arrive twice without a wait", at);
    warp().in_cluster_arrival = true;
    warp().cluster_generation = c.generation + 1;
    release(warp(), c.gathering);
    ++c.arrived;
    complete_if_gathered(c);
  });
}

void wait_cluster(Place at) {
  ClusterState& c = *block().cluster;
  if (!warp().in_cluster_arrival)
    machine->fail("barrier misuse: barrier.cluster.wait without an arrive", at);
  const uint64_t target = warp().cluster_generation;
  machine->wait_until("the cluster barrier", at, [&] { return c.generation >= target; });
  struct {
  } none;
  machine->collective("barrier.cluster.wait", at, &none, [&](auto&) {
    warp().in_cluster_arrival = false;
    acquire(warp(), c.released);
  });
}

// ---- mbarriers ----------------------------------------------------------------------------------

namespace {

void complete_if_due(Mbarrier& b, Place at) {
  if (b.bytes < -(1 << 20) || b.bytes > (1 << 20))
    machine->fail("barrier misuse: the byte count of an mbarrier left its range", at);
  if (b.pending > 0 || b.bytes != 0) return;
  b.completed = b.gathering;
  ++b.phase;
  b.completed.generic.advance(b.agent, b.phase);
  b.pending = b.expected;
}

void count_arrival(Mbarrier& b, int64_t bytes, Place at) {
  if (!warp().known.generic.covers(b.init))
    machine->fail("race: an mbarrier is used before its init is ordered", at);
  if (b.pending == 0)
    machine->fail("barrier misuse: more arrivals than the " + std::to_string(b.expected) +
                      " of the mbarrier's phase",
                  at);
  --b.pending;
  b.bytes += bytes;
  release(warp(), b.gathering);
  complete_if_due(b, at);
}

Block& peer(unsigned rank, const char* instruction, Place at) {
  ClusterState& c = *block().cluster;
  if (rank >= c.blocks.size() || c.blocks[rank]->rank != rank)
    machine->fail(std::string(instruction) + ": there is no block " + std::to_string(rank) +
                      " in the cluster",
                  at);
  Block& b = *c.blocks[rank];
  if (b.exited())
    machine->fail(std::string(instruction) + " into block " + std::to_string(rank) +
                      " of the cluster, which has exited",
                  at);
  return b;
}

}  // namespace

void init_barrier(uint32_t address, uint32_t arrivals, Place at) {
  SharedMemory& s = *block().shared;
  uint64_t value = arrivals;
  if (address % 8) machine->fail("misaligned: an mbarrier", at);
  if (s.barriers.count(address)) machine->fail("barrier misuse: mbarrier initialised twice", at);
  s.write(address, &value, 8, generic_access("mbarrier.init", at));
  Mbarrier& b = s.barriers[address];
  b.agent = machine->new_agent();
  b.remote_agent = machine->new_agent();
  b.expected = b.pending = arrivals;
  b.init = warp().stamp();
  for (uint32_t byte = 0; byte < 8; byte += kCellBytes)
    s.cells[(address + byte) / kCellBytes].is_barrier = true;
}

void fence_barrier_init(Place) {
  for (auto& [address, b] : block().shared->barriers)
    if (b.init.agent == warp().agent) b.fenced = true;
}

void arrive_barrier(uint32_t address, unsigned rank, Place at) {
  Block& target = peer(rank, "mbarrier.arrive", at);
  Mbarrier& b = target.shared->barrier(address, "mbarrier.arrive", at);
  if (rank != block().rank) {
    if (!b.fenced)
      machine->fail("missing fence: an mbarrier of another block without fence.mbarrier_init", at);
    target.arrivals[warp().agent] = warp().stamp().number;
  }
  count_arrival(b, 0, at);
}

void arrive_expect(uint32_t address, uint32_t bytes, Place at) {
  count_arrival(block().shared->barrier(address, "mbarrier.arrive.expect_tx", at), bytes, at);
}

void wait_barrier(uint32_t address, uint32_t parity, bool cluster, Place at) {
  if (parity > 1) machine->fail("barrier misuse: a parity of " + std::to_string(parity), at);
  Mbarrier& b = block().shared->barrier(address, "mbarrier.try_wait", at);
  if (!warp().known.generic.covers(b.init))
    machine->fail("race: an mbarrier is waited for before its init is ordered", at);
  self().idle_polls = 0;
  machine->wait_until("an mbarrier", at, [&] { return (b.phase & 1) != parity; });
  acquire(warp(), b.completed);
  if (!cluster) return;
  acquire(warp(), b.told);
  warp().known.generic.advance(b.remote_agent, b.phase);
}

// An ordinary write that happens later, in another block, and counts towards a phase there.
void store_remote(uint32_t address, uint32_t value, uint32_t barrier, uint32_t rank, Place at) {
  Block* target = &peer(rank, "st.async", at);
  Mbarrier* b = &target->shared->barrier(barrier, "st.async", at);
  if (!b->fenced)
    machine->fail("missing fence: st.async on an mbarrier without fence.mbarrier_init", at);
  auto known = snapshot(warp());
  ++target->loads_in_flight;
  machine->post([=] {
    const Access a{{b->remote_agent, b->phase + 1}, known.get(), Proxy::generic, "st.async", at};
    target->shared->write(address, &value, 4, a);
    --target->loads_in_flight;
    target->arrivals[b->agent] = b->phase + 1;
    b->told.join(*known);
    b->bytes -= 4;
    complete_if_due(*b, at);
  });
}

void load_remote(void* to, uint32_t address, uint32_t bytes, uint32_t rank, Place at) {
  Block& target = peer(rank, "ld.shared::cluster", at);
  target.shared->read(address, to, bytes, generic_access("ld.shared::cluster", at));
  if (rank != block().rank) target.arrivals[warp().agent] = warp().stamp().number;
}

// ---- cp.async -----------------------------------------------------------------------------------

void copy_async(uint32_t to, const void* from, uint32_t bytes, Place at) {
  if (bytes > 16 || bytes % 2) machine->fail("cp.async of " + std::to_string(bytes) + " bytes", at);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16)
    machine->fail("misaligned: cp.async of global memory", at);
  Thread& t = self();
  t.place = at;
  auto known = snapshot(warp());
  const Stamp stamp{warp().agent + kCopy, t.copies_committed + 1};
  SharedMemory* shared = block().shared.get();
  t.open_copies.copies.push_back([=] {
    const Access a{stamp, known.get(), Proxy::generic, "cp.async", at};
    uint16_t chunk[8] = {};
    for (uint32_t i = 0; i < bytes / 2; ++i)
      global.read(static_cast<const uint16_t*>(from) + i, chunk + i, 2, a);
    shared->write(to, chunk, 16, a);
    machine->statistics.bytes_loaded += bytes;
  });
}

// Moves the open group behind the others, and lets it run when Timing says. Late: waits run it.
static void commit(CopyGroups& groups, CopyGroup& open) {
  groups.push_back(std::make_shared<CopyGroup>(std::move(open)));
  open = {};
  if (machine->options().timing == Timing::late) return;
  machine->post([group = groups.back()] { group->run(); });
}

static void run_all_but(uint32_t pending, CopyGroups& groups) {
  while (groups.size() > pending) {
    groups.front()->run();
    groups.pop_front();
  }
}

void commit_copies() {
  ++self().copies_committed;
  commit(self().copy_groups, self().open_copies);
}

void wait_copies(uint32_t pending, Place) {
  Thread& t = self();
  run_all_but(pending, t.copy_groups);
  if (t.copies_committed > pending)
    warp().known.generic.advance(warp().agent + kCopy, t.copies_committed - pending);
}

// ---- TMA ----------------------------------------------------------------------------------------

TensorMap make_tensor_map(const TensorMap& m) {
  const bool valid = reinterpret_cast<uintptr_t>(m.base) % 16 == 0 && m.row_stride % 8 == 0 &&
                     m.columns > 0 && m.rows > 0 && m.box_columns > 0 && m.box_columns <= 64 &&
                     m.box_rows > 0 && m.box_rows <= 256 &&
                     (m.rows == 1 || m.row_stride >= m.columns);
  if (!valid) throw Error("the driver would refuse this tensor map");
  return m;
}

namespace {

// Calls f(shared address, global address, how many of them lie in the matrix) for each 8 elements.
template <class F>
void for_box(const TensorMap& m, uint32_t address, int column, int row, F f) {
  for (int r = 0; r < m.box_rows; ++r)
    for (int c = 0; c < m.box_columns; c += 8) {
      const uint32_t offset = static_cast<uint32_t>(r * m.box_columns + c) * 2;
      const int64_t y = int64_t{row} + r, x = int64_t{column} + c;
      const int64_t left = y >= 0 && y < m.rows && x >= 0 ? m.columns - x : 0;
      auto* element = static_cast<const uint16_t*>(m.base) + y * m.row_stride + x;
      // The swizzle is a function of the address, as in hardware.
      f(swizzle_128(address + offset), element, static_cast<int>(std::clamp<int64_t>(left, 0, 8)));
    }
}

}  // namespace

void load_tensor(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row,
                 uint16_t blocks, Place at) {
  if (to % 128) machine->fail("misaligned: TMA load into shared memory", at);
  if (column % 8) machine->fail("misaligned: TMA load of a column not on 16 bytes", at);
  auto known = snapshot(warp());
  const TensorMap m = map;  // the kernel's copy lives no longer than its thread
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    Block* target = &peer(rank, "TMA load", at);
    SharedMemory* shared = target->shared.get();
    const bool remote = rank != block().rank;
    const bool counted = (blocks & ((1u << rank) - 1)) == 0;  // from memory once, for all of them
    ++target->loads_in_flight;
    Mbarrier* b = &shared->barrier(barrier, "TMA load", at);
    if (!b->fenced && (remote || !b->fenced_here))
      machine->fail("missing fence: TMA on an mbarrier without fence.mbarrier_init", at);
    machine->post([=] {
      const Access a{{b->agent, b->phase + 1}, known.get(), Proxy::async, "TMA load", at};
      for_box(m, to, column, row, [&](uint32_t address, const uint16_t* from, int elements) {
        uint16_t chunk[8] = {};
        for (int i = 0; i < elements; ++i) global.read(from + i, chunk + i, 2, a);
        shared->write(address, chunk, 16, a);
        if (counted) machine->statistics.bytes_loaded += 2 * static_cast<unsigned>(elements);
      });
      --target->loads_in_flight;
      target->arrivals[a.stamp.agent] = a.stamp.number;
      b->bytes -= m.box_rows * m.box_columns * 2;
      complete_if_due(*b, at);
    });
  }
}

void store_tensor(const TensorMap& map, uint32_t from, int column, int row, Place at) {
  if (from % 128) machine->fail("misaligned: TMA store from shared memory", at);
  if (column % 8) machine->fail("misaligned: TMA store to a column not on 16 bytes", at);
  Warp& w = warp();
  auto known = snapshot(w);
  // Threads of one warp that store each get a number of their own.
  Thread& t = self();
  if (t.open_stores.number == 0) t.open_stores.number = ++w.stores_committed;
  const uint32_t number = t.open_stores.number;
  const Stamp reads{w.agent + kStoreRead, number}, writes{w.agent + kStoreWrite, number};
  SharedMemory* shared = block().shared.get();
  const TensorMap m = map;
  t.open_stores.copies.push_back([=] {
    const Access read{reads, known.get(), Proxy::async, "TMA store", at};
    const Access write{writes, known.get(), Proxy::async, "TMA store", at};
    for_box(m, from, column, row, [&](uint32_t address, const uint16_t* to, int elements) {
      if (elements == 0) return;
      uint16_t chunk[8];
      for (int i = 0; i < 8; i += 2)
        shared->read(address + static_cast<uint32_t>(i) * 2, chunk + i, 4, read);
      for (int i = 0; i < 8; ++i)  // whole 16 bytes, also where a row ends within them
        global.write(const_cast<uint16_t*>(to + i), chunk + i, 2, write);
    });
  });
}

void commit_stores() {
  Thread& t = self();
  if (t.open_stores.number == 0) t.open_stores.number = ++warp().stores_committed;
  commit(t.store_groups, t.open_stores);
}

void wait_stores(uint32_t pending, bool only_read, Place) {
  Thread& t = self();
  Warp& w = warp();
  uint32_t complete = 0;
  if (t.store_groups.size() > pending)
    complete = t.store_groups[t.store_groups.size() - pending - 1]->number;
  if (complete > t.stores_read) t.stores_read = complete;
  run_all_but(pending, t.store_groups);
  w.known.generic.advance(w.agent + kStoreRead, t.stores_read);
  if (!only_read && t.store_groups.size() == pending)
    w.known.generic.advance(w.agent + kStoreWrite, t.stores_read);
}

}  // namespace emu

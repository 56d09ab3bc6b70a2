#include "machine.h"

#include <algorithm>

#include "memory.h"

namespace emu {

Machine* machine = nullptr;

namespace {

constexpr int kRegisters = 65536;             // of a multiprocessor
constexpr uint64_t kDelay = 60, kStall = 40;  // rounds, at most
constexpr int kStallPercent = 3;

std::string name_of(Place p) {
  std::string file = p.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(p.line);
}

}  // namespace

void thread_main() {
  Thread& t = *machine->self;
  std::string thrown;
  try {
    t.warp->block->grid->launch->body();
  } catch (const std::exception& e) {
    thrown = e.what();
  }
  if (!thrown.empty()) machine->fail("exception: " + thrown, t.place);
  t.done = true;
  machine->leave();
}

void release(Warp& w, Knowledge& into) {
  into.join(w.known);
  w.known.generic.advance(w.agent, w.known.generic[w.agent] + 1);
}

std::shared_ptr<Knowledge> snapshot(Warp& w) {
  auto known = std::make_shared<Knowledge>();
  release(w, *known);
  return known;
}

std::string Machine::describe(const Thread& t) const {
  const Block& b = *t.warp->block;
  return b.grid->launch->name + " block (" + std::to_string(b.index_x) + ", " +
         std::to_string(b.index_y) + ") warp " + std::to_string(t.warp->index) + " lane " +
         std::to_string(t.lane) + " at " + name_of(t.place);
}

void Machine::fail(const std::string& what, Place at) {
  if (self != nullptr) self->place = at;
  const std::string who = self == nullptr ? "at " + name_of(at) : describe(*self);
  if (error_.empty()) error_ = what + "\n  " + who;
  if (!in_fiber_) throw Error(error_);
  for (;;) leave();  // the scheduler never comes back
}

void Machine::leave() {
  Thread* t = self;
  t->fiber.leave();
}

void Machine::post(std::function<void()> work) {
  if (options_.timing == Timing::early) return work();
  const bool late = options_.timing == Timing::late;
  events_.push_back({late ? ~uint64_t{0} : round + 1 + draw(kDelay), std::move(work)});
}

// Events that are due; or, if nothing else can go on, any one.
void Machine::deliver(bool force) {
  if (force && !events_.empty()) {
    const size_t i = draw(events_.size());
    events_[i].due = round;
  }
  for (size_t i = 0; i < events_.size();) {
    if (events_[i].due > round) {
      ++i;
      continue;
    }
    auto work = std::move(events_[i].work);
    events_[i] = std::move(events_.back());
    events_.pop_back();
    work();
  }
}

namespace {

bool has_ready_lane(const Warp& w) {
  return std::any_of(w.threads.begin(), w.threads.end(), [](const Thread& t) {
    return !t.done && (t.ready == nullptr || t.ready(t.ready_argument));
  });
}

}  // namespace

bool Machine::run_warp(Warp& w) {
  bool progress = false, again = true;
  while (again && error_.empty()) {
    again = false;
    // Lanes in another order each time: what one leaves to another must be synchronised.
    const uint64_t turn = options_.timing == Timing::early ? 0 : draw(64);
    for (uint64_t i = 0; i < 32; ++i) {
      Thread& t = w.threads[turn < 32 ? (i + turn) % 32 : 31 - (i + turn) % 32];
      if (t.done || (t.ready != nullptr && !t.ready(t.ready_argument))) continue;
      self = &t;
      in_fiber_ = true;
      t.fiber.enter();
      in_fiber_ = false;
      self = nullptr;
      if (!error_.empty()) return true;
      again = progress = true;
      if (t.fiber.overflowed())
        throw Error("a thread needs more than " + std::to_string(kStackBytes) +
                    " bytes of stack\n  " + describe(t));
      if (t.done &&
          std::all_of(w.threads.begin(), w.threads.end(), [](const Thread& u) { return u.done; }))
        finish_warp(w);
    }
    if (options_.timing == Timing::random && chance(30)) break;
  }
  return progress;
}

// Barriers of a whole block or cluster wait for the threads that have not exited.
void Machine::finish_warp(Warp& w) {
  Block& b = *w.block;
  check_drained(w);
  ++b.warps_done;
  NamedBarrier& all = b.named[0];
  if (all.whole_block && all.arrived > 0) complete_if_gathered(all, b);
  ClusterState& c = *b.cluster;
  --c.expected;
  complete_if_gathered(c);
  if (b.exited()) check_exit(b);
}

// A block may exit only once it knows of everything that happened to its shared memory.
void Machine::check_exit(Block& b) {
  Clock known;
  for (Warp& w : b.warps) known.join(w.known.generic);
  const Place at = b.warps[0].threads[0].place;
  bool unknown = b.loads_in_flight > 0;
  for (auto [agent, number] : b.arrivals) unknown |= !known.covers({agent, number});
  if (unknown)
    fail("block " + std::to_string(b.rank) +
             " has exited without knowing of a TMA load, or of an arrival or a read by another "
             "block",
         at);
  for (size_t i = 0; i < b.warps.size(); ++i) {
    const Warp &w = b.warps[i], &first = b.warps[i / 4 * 4];
    const Place place = (w.threads[0].place.line > 0 ? w : first).threads[0].place;
    if (w.wgmma_issued != first.wgmma_issued)
      fail("wgmma: not all warps of a warpgroup took part", place);
    if (w.registers != first.registers)
      fail("setmaxnreg: not all warps of a warpgroup took part", place);
  }
}

bool Machine::may_start(const Grid& grid) const {
  if (grid.next_cluster == grid.clusters) return false;
  if (grid.launch->after < 0) return true;
  const Grid& before = grids_[grid.launch->after];
  return before.complete() || (grid.launch->programmatic &&
                               before.blocks_released == before.clusters * before.launch->cluster);
}

void Machine::start_clusters() {
  for (;;) {
    std::vector<Grid*> ready;
    for (Grid& g : grids_)
      if (may_start(g) &&
          static_cast<int>(blocks_.size() + g.launch->cluster) <= options_.resident_blocks)
        ready.push_back(&g);
    if (ready.empty()) return;
    start_cluster(*ready[draw(ready.size())]);
  }
}

void Machine::start_cluster(Grid& grid) {
  const Launch& launch = *grid.launch;
  auto cluster = std::make_shared<ClusterState>();
  cluster->expected = launch.cluster * launch.threads / 32;
  const unsigned first = grid.next_cluster++ * launch.cluster;
  const uint32_t misalignment = static_cast<uint32_t>(draw(64)) * 16;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    auto b = std::make_unique<Block>();
    b->grid = &grid;
    b->index_x = (first + rank) % launch.grid_x;
    b->index_y = (first + rank) / launch.grid_x;
    b->rank = rank;
    b->cluster = cluster;
    b->shared = std::make_unique<SharedMemory>(misalignment, launch.shared_bytes);
    b->free_registers =
        kRegisters - static_cast<int>(launch.threads) *
                         std::min<int>(255, kRegisters / static_cast<int>(launch.threads) / 8 * 8);
    b->wgmma_log.resize((launch.threads + 127) / 128);
    for (size_t i = 0; i < b->wgmma_log.size(); ++i) b->tensor_agents.push_back(agents_++);
    b->warps = std::vector<Warp>(launch.threads / 32);
    for (size_t i = 0; i < b->warps.size(); ++i) {
      Warp& w = b->warps[i];
      w.block = b.get();
      w.index = static_cast<int>(i);
      w.agent = agents_;
      agents_ += kAgentsOfWarp;
      w.known.generic.advance(w.agent, 1);
      // A programmatic launch knows of the grid before it by griddepcontrol.wait alone.
      // What that grid itself waited for is long complete.
      const int before = launch.after;
      if (before >= 0 && !launch.programmatic) w.known.join(grids_[before].finished);
      if (before >= 0 && launch.programmatic && !grids_[before].launch->programmatic &&
          grids_[before].launch->after >= 0)
        w.known.join(grids_[grids_[before].launch->after].finished);
      if (!spare_threads_.empty()) {
        w.threads = std::move(spare_threads_.back());
        spare_threads_.pop_back();
      }
      w.threads.resize(32);
      for (int lane = 0; lane < 32; ++lane) {
        Thread fresh;
        std::swap(fresh.fiber, w.threads[lane].fiber);
        w.threads[lane] = std::move(fresh);
        w.threads[lane].warp = &w;
        w.threads[lane].lane = lane;
        w.threads[lane].fiber.start(thread_main);
      }
    }
    cluster->blocks.push_back(b.get());
    blocks_.push_back(std::move(b));
  }
}

namespace {

Place place_of(const Block& b) {
  for (const Warp& w : b.warps)
    if (!w.threads.empty() && w.threads[0].place.line > 0) return w.threads[0].place;
  return {};
}

}  // namespace

// Takes away the clusters all of whose blocks have exited.
void Machine::retire() {
  for (size_t i = 0; i < blocks_.size();) {
    Block& b = *blocks_[i];
    const auto& peers = b.cluster->blocks;
    if (!std::all_of(peers.begin(), peers.end(), [](const Block* p) { return p->exited(); })) {
      ++i;
      continue;
    }
    Grid& grid = *b.grid;
    const Place last = place_of(b);
    for (Warp& w : b.warps) {
      grid.finished.join(w.known);
      for (uint32_t engine = kStoreRead; engine < kAgentsOfWarp; ++engine)
        grid.finished.generic.advance(w.agent + engine, ~0u);
      // A grid's end is visible to every proxy.
      for (Clock& fenced : grid.finished.fenced) fenced.join(grid.finished.generic);
      spare_threads_.push_back(std::move(w.threads));
    }
    ++grid.blocks_done;
    if (grid.complete() && grid.launch->programmatic && !grid.waited)
      fail(grid.launch->name +
               " ended without waiting for the kernel before: what follows it may "
               "run before that one ends",
           last);
    if (!b.launched_dependents) ++grid.blocks_released;
    auto mine = std::find(b.cluster->blocks.begin(), b.cluster->blocks.end(), &b);
    *mine = b.cluster->blocks.back();
    b.cluster->blocks.pop_back();
    blocks_.erase(blocks_.begin() + static_cast<long>(i));
  }
}

void Machine::report_deadlock() {
  std::map<std::string, int> waiting;
  for (auto& b : blocks_)
    for (Warp& w : b->warps)
      for (Thread& t : w.threads)
        if (!t.done)
          ++waiting["block (" + std::to_string(b->index_x) + ", " + std::to_string(b->index_y) +
                    ") warp " + std::to_string(w.index) + " waits for " +
                    (t.waits_for ? t.waits_for : "nothing") + " at " + name_of(t.place)];
  std::string text = "deadlock: no thread can go on";
  for (auto& [what, lanes] : waiting)
    text += "\n  " + what + " (" + std::to_string(lanes) + " lanes)";
  throw Error(text);
}

void Machine::run(const std::vector<Launch>& launches, const Options& options) {
  options_ = options;
  random_.seed(options.seed);
  machine = this;
  for (const Launch& l : launches) {
    if (l.threads % 32 || l.grid_x % l.cluster || l.grid_x * l.grid_y == 0)
      throw Error(l.name + ": a launch of " + std::to_string(l.grid_x) + " blocks of " +
                  std::to_string(l.threads) + " threads in clusters of " +
                  std::to_string(l.cluster) + " is not possible");
    if (l.shared_bytes > kMaxSharedBytes || l.cluster > kMaxCluster || l.threads > 1024)
      throw Error(l.name + ": " + std::to_string(l.shared_bytes) + " bytes of shared memory, " +
                  std::to_string(l.threads) + " threads, clusters of " + std::to_string(l.cluster) +
                  ": more than a device has");
    grids_.push_back({&l, 0, l.grid_x * l.grid_y / l.cluster, 0, 0, {}});
  }
  std::vector<Warp*> order;
  const bool random = options.timing == Timing::random;
  for (;;) {
    ++round;
    retire();
    start_clusters();
    if (blocks_.empty()) break;
    deliver(false);
    order.clear();
    for (auto& b : blocks_)
      for (Warp& w : b->warps) order.push_back(&w);
    shuffle(order);
    bool progress = false, stalled = false;
    for (Warp* w : order) {
      if (random && chance(kStallPercent)) w->stalled_until = round + draw(kStall);
      if (w->stalled_until > round) {
        stalled = stalled || has_ready_lane(*w);
        continue;
      }
      progress |= run_warp(*w);
      if (!error_.empty()) throw Error(error_);
    }
    if (progress || stalled) continue;
    if (!events_.empty()) {
      deliver(true);
      continue;
    }
    report_deadlock();
  }
  while (!events_.empty()) deliver(true);
  for (Grid& g : grids_)
    if (!g.complete())
      throw Error(g.launch->name + ": could not start, more blocks than residency");
}

}  // namespace emu

// The emulated GPU: grids of clusters of blocks of warps of threads, and the scheduler that runs
// them in an order that its seed chooses.
//
// A thread runs until it has to wait. Warps are visited in random order and stall at random, blocks
// start as residency allows, and asynchronous work (TMA, wgmma, cp.async, bulk stores) completes
// when `Timing` says. Independent of all this, vector clocks (clock.h) prove each access ordered.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "clock.h"
#include "fiber.h"

namespace emu {

// A line of the kernel: the default argument of every instruction's model.
struct Place {
  const char* file = "";
  int line = 0;
  static constexpr Place here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
    return {f, l};
  }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Timing {
  early,  // asynchronous work is complete at once
  late,   // only when nothing else can go on, or when somebody waits for it
  random
};

struct Options {
  uint64_t seed = 0;
  Timing timing = Timing::random;
  int resident_blocks = 1 << 20;  // more wait for others to exit
};

struct Launch {
  std::string name;
  std::function<void()> body;  // calls the kernel; every thread runs it
  unsigned grid_x = 1, grid_y = 1;
  unsigned cluster = 1;  // blocks along x
  unsigned threads = 128;
  uint32_t shared_bytes = 0;  // dynamic
  int after = -1;             // index of the launch before it in its stream
  bool programmatic = false;  // may start once all blocks of that launch allow it
};

struct Dim {
  unsigned x, y, z;
};

struct Block;
struct Grid;
struct Warp;
struct WgmmaOp;

// Asynchronous copies that complete together. Whoever runs it empties it: an event, or a wait.
struct CopyGroup {
  std::vector<std::function<void()>> copies;
  uint32_t number = 0;
  void run() {
    auto mine = std::move(copies);
    copies.clear();
    for (auto& copy : mine) copy();
  }
};
using CopyGroups = std::deque<std::shared_ptr<CopyGroup>>;

// Accumulators that wgmma owns from its issue until it was waited for.
struct Accumulators {
  float* registers;
  int count;
  std::vector<float> saved;
};

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false;
  bool alone = false;  // in a branch of the elected lane, until the warp is synchronised
  // What it waits for, in the frame of the function that waits.
  bool (*ready)(void*) = nullptr;
  void* ready_argument = nullptr;
  const char* waits_for = nullptr;
  Place place;
  // cp.async: groups committed and not yet complete, and the open one.
  CopyGroups copy_groups;
  CopyGroup open_copies;
  uint32_t copies_committed = 0;
  // Bulk stores, likewise; the number of each group among the warp's.
  CopyGroups store_groups;
  CopyGroup open_stores;
  uint32_t stores_read = 0;  // number of the last group that was waited for
  std::vector<Accumulators> accumulators;
  const uint32_t* polled = nullptr;  // the flag read last
  int idle_polls = 0;                // flags read since anybody wrote one
  uint64_t polled_news = 0;          // Machine::news at the last of them
};

struct Warp {
  Block* block = nullptr;
  int index = 0;       // in its block
  uint32_t agent = 0;  // agent + kStoreRead.. are its engines
  Clock foreign;       // fenced writes to global memory by others: a fence here makes them known
  uint32_t unfenced[2] = {0, 0};  // lanes that wrote to the space since they last fenced it
  Knowledge known;
  uint64_t stalled_until = 0;
  std::vector<Thread> threads;
  // The collective instruction that lanes are gathering at.
  int gathered = 0;
  uint64_t generation = 0;
  const char* collective = nullptr;
  Place collective_place;
  std::array<void*, 32> slots{};
  // wgmma, by group in order of issue.
  std::deque<std::shared_ptr<WgmmaOp>> wgmmas;
  uint32_t wgmma_committed = 0, wgmma_issued = 0;
  bool wgmma_fenced = false;
  uint32_t stores_committed = 0;  // groups of bulk stores
  bool in_cluster_arrival = false;
  uint64_t cluster_generation = 0;  // that completes the arrival
  int registers = 0;                // of each thread; 0: as launched

  Stamp stamp() const { return {agent, known.generic[agent]}; }
};
constexpr uint32_t kStoreRead = 1, kStoreWrite = 2, kCopy = 3, kAgentsOfWarp = 4;
constexpr uint32_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90
constexpr unsigned kMaxCluster = 8;

struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  unsigned always = 0;       // what the first use of this barrier expected
  bool whole_block = false;  // __syncthreads
  uint64_t generation = 0;
  Knowledge gathering, released;
};

struct ClusterState {
  unsigned arrived = 0, expected = 0;
  uint64_t generation = 0;
  Knowledge gathering, released;
  std::vector<Block*> blocks;
};

struct SharedMemory;  // memory.h

struct Block {
  Grid* grid = nullptr;
  unsigned index_x = 0, index_y = 0, rank = 0;
  std::shared_ptr<ClusterState> cluster;
  std::vector<Warp> warps;
  std::unique_ptr<SharedMemory> shared;
  std::array<NamedBarrier, 16> named;
  std::vector<uint32_t> tensor_agents;           // of each warpgroup
  std::vector<std::vector<uint64_t>> wgmma_log;  // of each warpgroup: signatures in order
  int free_registers = 0;
  int warps_done = 0;
  bool launched_dependents = false;
  bool exited() const { return warps_done == static_cast<int>(warps.size()); }
  // The last event of each agent that changed this block's shared memory without its threads, or
  // read it: TMA loads, arrivals and reads from other blocks.
  std::map<uint32_t, uint32_t> arrivals;
  int loads_in_flight = 0;
};

struct Grid {
  const Launch* launch = nullptr;
  unsigned next_cluster = 0, clusters = 0;
  unsigned blocks_done = 0, blocks_released = 0;
  Knowledge finished;
  bool waited = false;  // by griddepcontrol.wait, for the grid before
  bool complete() const { return blocks_done == clusters * launch->cluster; }
};

struct Statistics {
  uint64_t instructions = 0, bank_conflicts = 0, bytes_loaded = 0;
};

class Machine {
 public:
  void run(const std::vector<Launch>& launches, const Options& options);

  // From within a thread ---------------------------------------------------------------------
  [[noreturn]] void fail(const std::string& what, Place at);
  template <class Ready>
  void wait_until(const char* what, Place at, Ready ready);
  // Gathers the 32 lanes, then one of them calls body(slots), which sees every lane's `mine`.
  template <class Mine, class Body>
  void collective(const char* name, Place at, Mine* mine, Body body);

  // Runs `work` at once or later, as Timing says.
  void post(std::function<void()> work);
  uint32_t new_agent() { return agents_++; }
  bool chance(int percent) { return static_cast<int>(random_() % 100) < percent; }
  uint64_t draw(uint64_t below) { return random_() % below; }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[draw(i)]);
  }
  const Options& options() const { return options_; }
  std::string describe(const Thread& t) const;
  std::vector<Grid>& grids() { return grids_; }

  Thread* self = nullptr;
  Statistics statistics;
  uint64_t round = 0;
  uint64_t news = 0;  // writes of flags so far

 private:
  friend void thread_main();
  struct Event {
    uint64_t due;
    std::function<void()> work;
  };
  void start_clusters();
  void start_cluster(Grid& grid);
  bool may_start(const Grid& grid) const;
  void retire();
  void finish_warp(Warp& w);
  void check_exit(Block& b);
  bool run_warp(Warp& warp);
  void deliver(bool force);
  [[noreturn]] void report_deadlock();
  void leave();

  Options options_;
  std::mt19937_64 random_;
  uint32_t agents_ = 1;
  std::vector<Grid> grids_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::vector<Thread>> spare_threads_;
  std::vector<Event> events_;
  std::string error_;
  bool in_fiber_ = false;
};

// Completes a barrier at which everybody has arrived who has not exited.
void complete_if_gathered(NamedBarrier& b, const Block& of);
void complete_if_gathered(ClusterState& c);

extern Machine* machine;  // the one that runs

inline Thread& self() { return *machine->self; }
inline Warp& warp() { return *machine->self->warp; }
inline Block& block() { return *machine->self->warp->block; }

// Publishes what this warp knows; later events of it are not part of that.
void release(Warp& w, Knowledge& into);
// What asynchronous work knows that this warp issues now.
std::shared_ptr<Knowledge> snapshot(Warp& w);
inline void acquire(Warp& w, const Knowledge& from) { w.known.join(from); }

template <class Ready>
void Machine::wait_until(const char* what, Place at, Ready ready) {
  Thread& t = *self;
  t.place = at;
  while (!ready()) {
    t.waits_for = what;
    t.ready = [](void* f) { return (*static_cast<Ready*>(f))(); };
    t.ready_argument = &ready;
    leave();
  }
  t.ready = nullptr;
}

template <class Mine, class Body>
void Machine::collective(const char* name, Place at, Mine* mine, Body body) {
  Thread& t = *self;
  Warp& w = *t.warp;
  if (t.alone && std::string(name) != "bar.warp.sync")
    fail(std::string("the elected lane is at ") + name + " without bar.warp.sync before", at);
  if (w.gathered == 0) {
    w.collective = name;
    w.collective_place = at;
  } else if (w.collective != name || w.collective_place.line != at.line) {
    fail(std::string("lanes of one warp are at different collective instructions: ") + name +
             " here, " + w.collective + " at line " + std::to_string(w.collective_place.line),
         at);
  }
  w.slots[t.lane] = mine;
  t.idle_polls = 0;
  const uint64_t generation = w.generation;
  t.place = at;
  if (++w.gathered == 32) {
    std::array<Mine*, 32> lanes;
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Mine*>(w.slots[i]);
    body(lanes);
    w.gathered = 0;
    ++w.generation;
  } else {
    wait_until(name, at, [&w, generation] { return w.generation != generation; });
  }
}

}  // namespace emu

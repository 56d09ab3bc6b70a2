// Shared and global memory with a shadow: who wrote and read each piece last, and whether the next
// access is ordered after it.
#pragma once
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emu {

constexpr uint32_t kCellBytes = 4;  // of shared memory
constexpr uint8_t kPoison = 0xFF;   // as bf16 and fp16 a NaN

// The 128-byte swizzle as hardware applies it: bits 4-6 of the address exclusive-or bits 7-9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

enum class Proxy { generic, async };

// Who accesses, seen from the memory: the event, and what is ordered before it.
struct Access {
  Stamp stamp;
  const Knowledge* known;
  Proxy proxy;
  const char* instruction;
  Place place;
};

struct Record {
  Stamp stamp;
  Proxy proxy;
  const char* instruction;
  Place place;
};

struct Cell {
  bool written = false, is_barrier = false;
  Record write{};
  std::vector<Record> reads;
};

struct Mbarrier {
  uint32_t agent = 0;
  uint32_t remote_agent = 0;  // of words that other blocks store
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  Stamp init;
  bool fenced = false;       // by fence.mbarrier_init: for other blocks too
  bool fenced_here = false;  // by a proxy fence: for TMA of this block
  Knowledge gathering, completed;
  Knowledge told;  // by words that other blocks stored: for waits of cluster scope
};

// Marks the cell read or written, and reports the access if the one before it is not ordered.
void read_cell(Cell& cell, const Access& a, Space space, const char* where);
void write_cell(Cell& cell, const Access& a, Space space, const char* where);

struct SharedMemory {
  SharedMemory(uint32_t misalignment, uint32_t dynamic_bytes);
  void read(uint32_t address, void* to, uint32_t bytes, const Access& a);
  void write(uint32_t address, const void* from, uint32_t bytes, const Access& a);
  Mbarrier& barrier(uint32_t address, const char* instruction, Place at);

  uint32_t base;  // where dynamic shared memory starts, 16-byte aligned
  uint32_t end;
  std::vector<uint8_t> bytes;
  std::vector<Cell> cells;
  std::unordered_map<uint32_t, Mbarrier> barriers;

 private:
  void check_bounds(uint32_t address, uint32_t size, const Access& a);
};

// Global memory: buffers that the caller registers. Whatever lies outside them is out of bounds.
// An output is poisoned, unless it is too large for that; a workspace is not.
enum class Use { input, output, workspace };

struct Buffer {
  std::string name;
  uint8_t* begin;
  uint64_t size;
  Use use;
  std::vector<Cell> cells;                    // one for each 2 bytes; none of an input
  std::unordered_map<uint64_t, Cell> sparse;  // instead, of a buffer too large for that
  Cell& cell(uint64_t i) { return cells.empty() ? sparse[i] : cells[i]; }
};

class GlobalMemory {
 public:
  void add(const std::string& name, void* begin, uint64_t bytes, Use use);
  void read(const void* from, void* to, uint64_t bytes, const Access& a);
  void write(void* to, const void* from, uint64_t bytes, const Access& a);
  Knowledge& flag(const uint32_t* address, const char* instruction, Place at);
  void clear();

 private:
  Buffer& find(const void* address, uint64_t bytes, const Access& a);
  std::vector<Buffer> buffers_;  // inputs may overlap
  std::unordered_map<const uint32_t*, Knowledge> flags_;
};

extern GlobalMemory global;

Access generic_access(const char* instruction, Place at);
// Notes that this lane has written to the space by ordinary stores.
void mark_unfenced(Space space);
// At the exit of a warp: reports asynchronous work that nobody waited for.
void check_drained(Warp& w);

}  // namespace emu

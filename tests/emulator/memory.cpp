#include "memory.h"

namespace emu {

GlobalMemory global;

namespace {

std::string text(const Record& r) {
  std::string file = r.place.file;
  return std::string(r.instruction) + " at " + file.substr(file.find_last_of('/') + 1) + ":" +
         std::to_string(r.place.line);
}

// Whether what `before` did is ordered before `a`. A generic write must have been fenced for the
// async proxy; reads and async writes only need to be ordered.
bool ordered(const Record& before, bool was_write, const Access& a, Space space) {
  const bool crosses = was_write && before.proxy == Proxy::generic && a.proxy == Proxy::async;
  return (crosses ? a.known->async(space) : a.known->generic).covers(before.stamp);
}

[[noreturn]] void race(const Record& before, const char* did, const char* does, const Access& a,
                       const std::string& where) {
  const bool proxy = a.known->generic.covers(before.stamp);
  machine->fail(std::string(proxy ? "missing proxy fence: " : "race: ") + where + ", " + did +
                    " by " + text(before) + ", is " + does + " by " + a.instruction +
                    (proxy ? " without a proxy fence between" : ", unordered"),
                a.place);
}

}  // namespace

void read_cell(Cell& cell, const Access& a, Space space, const char* where) {
  if (cell.is_barrier)
    machine->fail("barrier misuse: " + std::string(a.instruction) + " of an mbarrier's memory",
                  a.place);
  if (!cell.written)
    machine->fail("uninitialised: " + std::string(where) + " is read by " + a.instruction, a.place);
  if (!ordered(cell.write, true, a, space)) race(cell.write, "written", "read", a, where);
  for (Record& r : cell.reads)
    if (r.stamp.agent == a.stamp.agent) {
      r = {a.stamp, a.proxy, a.instruction, a.place};
      return;
    }
  cell.reads.push_back({a.stamp, a.proxy, a.instruction, a.place});
}

void write_cell(Cell& cell, const Access& a, Space space, const char* where) {
  if (cell.is_barrier)
    machine->fail("barrier misuse: " + std::string(a.instruction) + " over an mbarrier", a.place);
  if (cell.written && !ordered(cell.write, true, a, space))
    race(cell.write, "written", "overwritten", a, where);
  for (const Record& r : cell.reads)
    if (!ordered(r, false, a, space)) race(r, "read", "overwritten", a, where);
  cell.written = true;
  cell.write = {a.stamp, a.proxy, a.instruction, a.place};
  cell.reads.clear();
}

void mark_unfenced(Space space) {
  if (machine->self != nullptr) warp().unfenced[static_cast<int>(space)] |= 1u << self().lane;
}

Access generic_access(const char* instruction, Place at) {
  return {warp().stamp(), &warp().known, Proxy::generic, instruction, at};
}

// ---- shared memory ------------------------------------------------------------------------------

SharedMemory::SharedMemory(uint32_t misalignment, uint32_t dynamic_bytes)
    : base(misalignment), end(misalignment + dynamic_bytes) {
  bytes.assign(end, kPoison);
  cells.resize((end + kCellBytes - 1) / kCellBytes);
}

void SharedMemory::check_bounds(uint32_t address, uint32_t size, const Access& a) {
  if (address % size)
    machine->fail("misaligned: " + std::string(a.instruction) + " of shared memory", a.place);
  if (address < base || address + size > end)
    machine->fail("out of bounds: " + std::string(a.instruction) + " of " + std::to_string(size) +
                      " bytes at byte " + std::to_string(int64_t{address} - base) + " of " +
                      std::to_string(end - base) + " bytes of shared memory",
                  a.place);
}

void SharedMemory::read(uint32_t address, void* to, uint32_t size, const Access& a) {
  check_bounds(address, size, a);
  for (uint32_t c = address / kCellBytes; c <= (address + size - 1) / kCellBytes; ++c)
    read_cell(cells[c], a, Space::shared, "shared memory");
  std::memcpy(to, &bytes[address], size);
}

void SharedMemory::write(uint32_t address, const void* from, uint32_t size, const Access& a) {
  check_bounds(address, size, a);
  for (uint32_t c = address / kCellBytes; c <= (address + size - 1) / kCellBytes; ++c)
    write_cell(cells[c], a, Space::shared, "shared memory");
  if (a.proxy == Proxy::generic) mark_unfenced(Space::shared);
  std::memcpy(&bytes[address], from, size);
}

Mbarrier& SharedMemory::barrier(uint32_t address, const char* instruction, Place at) {
  auto found = barriers.find(address);
  if (found == barriers.end())
    machine->fail(
        std::string("barrier misuse: ") + instruction + " of an mbarrier that was not initialised",
        at);
  return found->second;
}

// ---- global memory ------------------------------------------------------------------------------

void GlobalMemory::clear() {
  buffers_.clear();
  flags_.clear();
}

void GlobalMemory::add(const std::string& name, void* begin, uint64_t bytes, Use use) {
  if (bytes == 0) return;
  constexpr uint64_t kSparse = uint64_t{1} << 30;
  Buffer b{name, static_cast<uint8_t*>(begin), bytes, use, {}, {}};
  const bool dense = bytes < kSparse;
  if (use != Use::input && dense) b.cells.resize((bytes + 1) / 2);
  if (use == Use::workspace)
    for (Cell& c : b.cells) c.written = true;
  if (use == Use::output && dense) std::memset(begin, kPoison, bytes);
  buffers_.push_back(std::move(b));
}

Buffer& GlobalMemory::find(const void* address, uint64_t bytes, const Access& a) {
  constexpr int64_t kNear = 1 << 16;
  auto* first = static_cast<uint8_t*>(const_cast<void*>(address));
  const Buffer* near = nullptr;
  for (Buffer& b : buffers_) {
    if (first >= b.begin && first + bytes <= b.begin + b.size) return b;
    if (first + kNear >= b.begin && first < b.begin + b.size + kNear) near = &b;
  }
  std::string where = "outside every tensor";
  if (near != nullptr)
    where = "at byte " + std::to_string(first - near->begin) + " of " + near->name +
            ", which has " + std::to_string(near->size);
  machine->fail("out of bounds: " + std::string(a.instruction) + " of " + std::to_string(bytes) +
                    " bytes " + where,
                a.place);
}

void GlobalMemory::read(const void* from, void* to, uint64_t bytes, const Access& a) {
  if (bytes == 0) return;
  if (reinterpret_cast<uintptr_t>(from) % (bytes & -bytes))
    machine->fail("misaligned: " + std::string(a.instruction) + " of global memory", a.place);
  Buffer& b = find(from, bytes, a);
  const uint64_t offset = static_cast<const uint8_t*>(from) - b.begin;
  if (b.use != Use::input)
    for (uint64_t c = offset / 2; c < (offset + bytes + 1) / 2; ++c)
      read_cell(b.cell(c), a, Space::global, b.name.c_str());
  std::memcpy(to, from, bytes);
}

void GlobalMemory::write(void* to, const void* from, uint64_t bytes, const Access& a) {
  if (reinterpret_cast<uintptr_t>(to) % (bytes & -bytes))
    machine->fail("misaligned: " + std::string(a.instruction) + " of global memory", a.place);
  Buffer& b = find(to, bytes, a);
  if (b.use == Use::input)
    machine->fail("input overwritten: " + b.name + " is written by " + a.instruction, a.place);
  const uint64_t offset = static_cast<uint8_t*>(to) - b.begin;
  for (uint64_t c = offset / 2; c < (offset + bytes + 1) / 2; ++c)
    write_cell(b.cell(c), a, Space::global, b.name.c_str());
  if (a.proxy == Proxy::generic) mark_unfenced(Space::global);
  std::memcpy(to, from, bytes);
}

Knowledge& GlobalMemory::flag(const uint32_t* address, const char* instruction, Place at) {
  const Access a = generic_access(instruction, at);
  Buffer& b = find(address, 4, a);
  // An ordinary write of the word, its zeroing, has to be ordered before. Flags among themselves
  // are atomic, so this is not noted as a read.
  const uint64_t first =
      static_cast<uint64_t>(reinterpret_cast<const uint8_t*>(address) - b.begin) / 2;
  for (uint64_t c = first; b.use != Use::input && c < first + 2; ++c) {
    Cell seen = b.cell(c);
    read_cell(seen, a, Space::global, b.name.c_str());
  }
  return flags_[address];
}

// ---- exit ---------------------------------------------------------------------------------------

void check_drained(Warp& w) {
  auto leaves = [&](const std::string& what) {
    machine->fail("warp " + std::to_string(w.index) + " exits with " + what, w.threads[0].place);
  };
  if (!w.wgmmas.empty()) leaves("wgmma that it did not wait for");
  for (Thread& t : w.threads) {
    if (!t.store_groups.empty() || !t.open_stores.copies.empty())
      leaves("bulk stores whose shared memory may not have been read yet");
    if (!t.open_copies.copies.empty()) leaves("cp.async that it did not commit");
    for (auto& group : t.copy_groups)
      if (!group->copies.empty()) leaves("cp.async that it did not wait for");
  }
}

}  // namespace emu

// Barriers, fences and asynchronous copies.
#pragma once
#include "memory.h"

namespace emu {

// What cuTensorMapEncodeTiled encodes: rows of 16-bit elements, boxes of 64 columns at most,
// 128-byte swizzle, zero fill.
struct TensorMap {
  const void* base = nullptr;
  int64_t columns = 0, rows = 0, row_stride = 0;  // elements
  int box_columns = 0, box_rows = 0;
};
// Throws Error where the driver would refuse.
TensorMap make_tensor_map(const TensorMap& map);

constexpr unsigned kWholeBlock = ~0u;  // all threads that have not exited, as __syncthreads
void sync_named(int id, unsigned threads, bool waits, Place at);
void arrive_cluster(Place at);
void wait_cluster(Place at);

void init_barrier(uint32_t address, uint32_t arrivals, Place at);
void fence_barrier_init(Place at);
void arrive_barrier(uint32_t address, unsigned rank, Place at);
void arrive_expect(uint32_t address, uint32_t bytes, Place at);
// `cluster`: with a scope in which st.async of another block is visible.
void wait_barrier(uint32_t address, uint32_t parity, bool cluster, Place at);
void store_remote(uint32_t address, uint32_t value, uint32_t barrier, uint32_t rank, Place at);
// An ordinary read of another block's memory, which must not exit before it knows of it.
void load_remote(void* to, uint32_t address, uint32_t bytes, uint32_t rank, Place at);

void copy_async(uint32_t to, const void* from, uint32_t bytes, Place at);
void commit_copies();
void wait_copies(uint32_t pending, Place at);

void load_tensor(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row,
                 uint16_t blocks, Place at);
void store_tensor(const TensorMap& map, uint32_t from, int column, int row, Place at);
void commit_stores();
void wait_stores(uint32_t pending, bool only_read, Place at);

void fence_proxy(Space space);
uint32_t acquire_flag(const uint32_t* flag, Place at);
void release_flag(uint32_t* flag, uint32_t value, Place at);
uint32_t add_to(uint32_t* counter, uint32_t value, Place at);
void add_release(uint32_t* counter, uint32_t value, Place at);

void change_registers(int registers, bool increase, Place at);
void launch_dependents();
void wait_dependency(Place at);

}  // namespace emu

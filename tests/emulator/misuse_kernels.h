// The kernels of misuse.cpp: first barriers, memory and tensor cores one by one.
#pragma once
#include "cuda/ptx.cuh"
#include "memory.h"

namespace emu {
namespace {

using namespace lora_kernels;
using namespace lora_kernels::ptx;

constexpr uint32_t kTile = 64 * kRowBytes;  // 64 rows of 64 elements

// What the kernels work on: 64x64 elements in, 64x64 out, flags.
struct Memory {
  alignas(16) uint16_t in[64 * 64];
  uint16_t gap_before[64];
  alignas(16) uint16_t out[64 * 64];
  uint16_t gap_behind[64];
  uint32_t flags[4];
};
Memory memory;
TensorMap in_map{memory.in, 64, 64, 64, 64, 64}, out_map{memory.out, 64, 64, 64, 64, 64};

uint32_t warp_of_thread() { return threadIdx.x / 32; }
uint32_t lane_of_thread() { return threadIdx.x % 32; }

// An mbarrier behind one tile, initialised by thread 0 and known to all.
uint32_t make_barrier(uint32_t arrivals, bool fence = true) {
  const uint32_t barrier = shared_base() + 2 * kTile;
  if (threadIdx.x == 0) {
    barrier_init(barrier, arrivals);
    if (fence) barrier_init_fence();
  }
  block_sync();
  return barrier;
}
// By one thread.
void start_load(uint32_t barrier) {
  barrier_arrive_expect(barrier, kTile);
  tma_load(shared_base(), &in_map, barrier, 0, 0);
}
void store_tile(const TensorMap& map, uint32_t tile) {
  tma_store(&map, tile, 0, 0);
  tma_store_commit();
  tma_store_wait_read<0>();
}
// The tile `in` in shared memory, waited for by every thread.
uint32_t load_tile() {
  const uint32_t barrier = make_barrier(1), tile = shared_base();
  if (threadIdx.x == 0) start_load(barrier);
  barrier_wait(barrier, 0);
  return tile;
}
void fill_tile(uint32_t tile) {
  const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  for (uint32_t i = threadIdx.x; i < kTile / 16; i += 128) store_shared_x4(tile + i * 16, ones);
}
void multiply_tile(float (&d)[32], uint32_t tile) {
  wgmma_fence();
  wgmma<bf16, 0, 0>(d, k_major_descriptor(tile), k_major_descriptor(tile), true);
  wgmma_commit();
}

void mbarrier_never_completes(bool wrong) {
  const uint32_t barrier = make_barrier(wrong ? 2 : 1);
  if (threadIdx.x == 0) barrier_arrive(barrier);
  barrier_wait(barrier, 0);
}
void wrong_phase(bool wrong) {
  const uint32_t barrier = make_barrier(1), tile = shared_base();
  if (threadIdx.x == 0) start_load(barrier);
  barrier_wait(barrier, wrong ? 1 : 0);  // "the phase before the first" counts as complete
  load_shared(tile);
}
void too_few_bytes(bool wrong) {
  const uint32_t barrier = make_barrier(1), tile = shared_base();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier, wrong ? kTile / 2 : kTile);
    tma_load(tile, &in_map, barrier, 0, 0);
  }
  barrier_wait(barrier, 0);
  load_shared(tile + kTile - 16);
}
void too_many_arrivals(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier, kTile);
    if (wrong) barrier_arrive(barrier);  // while the bytes of the phase are still missing
    tma_load(shared_base(), &in_map, barrier, 0, 0);
  }
  barrier_wait(barrier, 0);
}
void barrier_not_initialised(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  if (threadIdx.x == 0) barrier_arrive(barrier + (wrong ? 8 : 0));
}
void barrier_init_not_fenced(bool wrong) {
  const uint32_t barrier = make_barrier(1, !wrong);
  if (threadIdx.x == 0) start_load(barrier);
  barrier_wait(barrier, 0);
}
void threads_disagree_on_a_barrier(bool wrong) {
  named_barrier_sync<1>(wrong && warp_of_thread() > 1 ? 64 : 128);
}
void lanes_diverge(bool wrong) {
  if (wrong && lane_of_thread() > 15) warp_sync();
  wgmma_fence();
  if (!wrong || lane_of_thread() <= 15) warp_sync();
}
void shared_out_of_bounds(bool wrong) {
  store_shared(shared_base() + (wrong ? 3 * kTile : 0) + threadIdx.x * 16, 1.0f);
}
void shared_uninitialised(bool wrong) {
  const uint32_t tile = shared_base();
  if (!wrong) fill_tile(tile);
  block_sync();
  load_shared(tile + threadIdx.x * 4);
}
void shared_race(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  if (!wrong) block_sync();
  load_shared(tile + (127 - threadIdx.x) * 16);
}
void global_out_of_bounds(bool wrong) {
  store_global(memory.out + 64 * 64 - (wrong ? 127 : 128) + threadIdx.x, uint16_t{1});
}
void global_uninitialised(bool wrong) {
  if (!wrong) store_global(memory.out + threadIdx.x, uint16_t{1});
  load_global(memory.out + threadIdx.x);
}
void two_blocks_write_the_same(bool wrong) {
  store_global(memory.out + (wrong ? 0 : blockIdx.x * 128) + threadIdx.x, uint16_t{1});
}
void input_written(bool wrong) {
  store_global((wrong ? memory.in : memory.out) + threadIdx.x, uint16_t{1});
}
void flag_before_data(bool wrong) {
  if (blockIdx.x == 0) {
    if (!wrong) store_global(memory.out + threadIdx.x, uint16_t{1});
    block_sync();
    if (threadIdx.x == 0) store_release(memory.flags, 1);
    if (wrong) store_global(memory.out + threadIdx.x, uint16_t{1});
  } else {
    while (load_acquire(memory.flags) == 0) {
    }
    load_global(memory.out + threadIdx.x);
  }
}
void flag_before_barrier(bool wrong) {
  if (blockIdx.x == 0) {
    store_global(memory.out + threadIdx.x, uint16_t{1});
    if (!wrong) block_sync();
    if (threadIdx.x == 0) store_release(memory.flags, 1);
  } else {
    while (load_acquire(memory.flags) == 0) {
    }
    load_global(memory.out + threadIdx.x);
  }
}
void stored_before_fence(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  if (!wrong) fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) store_tile(out_map, tile);
}
void stored_before_barrier(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  fence_async_shared();
  if (!wrong) block_sync();
  if (threadIdx.x == 0) store_tile(out_map, tile);
}
void overwritten_while_stored(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) {
    tma_store(&out_map, tile, 0, 0);
    tma_store_commit();
    if (!wrong) tma_store_wait_read<0>();
  }
  block_sync();
  fill_tile(tile);
  if (threadIdx.x == 0) tma_store_wait_read<0>();
}
void exit_before_store_is_read(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) {
    tma_store(&out_map, tile, 0, 0);
    if (!wrong) {
      tma_store_commit();
      tma_store_wait_read<0>();
    }
  }
}
void wgmma_before_fence_of_proxy(bool wrong) {
  float d[32] = {};
  fill_tile(shared_base());
  if (!wrong) fence_async_shared();
  block_sync();
  multiply_tile(d, shared_base());
  wgmma_wait<0>();
}
void wgmma_without_fence(bool wrong) {
  float d[32] = {};
  const uint32_t tile = load_tile();
  if (!wrong) wgmma_fence();
  wgmma<bf16, 0, 0>(d, k_major_descriptor(tile), k_major_descriptor(tile), true);
  wgmma_commit();
  wgmma_wait<0>();
}
void wgmma_not_waited_for(bool wrong) {
  float d[32] = {};
  multiply_tile(d, load_tile());
  if (!wrong) wgmma_wait<0>();
}
void wgmma_of_other_warps_differs(bool wrong) {
  float d[32] = {};
  const uint32_t tile = load_tile();
  const uint32_t step = wrong && warp_of_thread() == 3 ? kKMajorStep : 0;
  wgmma_fence();
  wgmma<bf16, 0, 0>(d, k_major_descriptor(tile + step), k_major_descriptor(tile), true);
  wgmma_commit();
  wgmma_wait<0>();
}
// The slot is loaded again as soon as wgmma was issued, not when it has read it.
void slot_released_early(bool wrong) {
  float d[32] = {};
  const uint32_t tile = load_tile(), barrier = shared_base() + 2 * kTile;
  multiply_tile(d, tile);
  if (!wrong) wgmma_wait<0>();
  block_sync();
  if (threadIdx.x == 0) start_load(barrier);
  barrier_wait(barrier, 1);
  if (wrong) wgmma_wait<0>();
}
void accumulators_read_early(bool wrong) {
  float d[32] = {};
  multiply_tile(d, load_tile());
  const float early = d[0];
  wgmma_wait<0>();
  const float value = wrong ? early : d[0];
  if (value != value) machine->fail("a NaN in place of a sum", Place::here());
}
void cp_async_not_waited_for(bool wrong) {
  const uint32_t tile = shared_base() + threadIdx.x * 16;
  cp_async_16(tile, memory.in + threadIdx.x * 8, 16);
  cp_async_commit();
  if (!wrong) cp_async_wait<0>();
  load_shared(tile);
  cp_async_wait<0>();
}
void misaligned_copy(bool wrong) {
  cp_async_16(shared_base() + threadIdx.x * 16, memory.in + threadIdx.x * 8 + (wrong ? 4 : 0), 16);
  cp_async_commit();
  cp_async_wait<0>();
}
void misaligned_matrix(bool wrong) {
  fill_tile(shared_base());
  block_sync();
  uint32_t r[4];
  load_matrix_x4(r, shared_base() + threadIdx.x % 32 * 16 + (wrong ? 8 : 0));
}
void load_of_a_column_off_16_bytes(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier, kTile);
    tma_load(shared_base(), &in_map, barrier, wrong ? 4 : 8, 0);
  }
  barrier_wait(barrier, 0);
}
void store_to_a_column_off_16_bytes(bool wrong) {
  fill_tile(shared_base());
  fence_async_shared();
  block_sync();
  if (threadIdx.x != 0) return;
  tma_store(&out_map, shared_base(), wrong ? 4 : 8, 0);
  tma_store_commit();
  tma_store_wait_read<0>();
}
// Beside a row of 60 columns, of which the last four share 16 bytes with what another thread
// writes.
void store_past_the_end_of_a_row(bool wrong) {
  static TensorMap whole{memory.out, 56, 1, 64, 64, 64}, part{memory.out, 60, 1, 64, 64, 64};
  fill_tile(shared_base());
  fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) store_tile(wrong ? part : whole, shared_base());
  if (threadIdx.x == 64) store_global(memory.out + 60, uint16_t{1});
}
void registers_past_the_pool(bool wrong) {
  // 3 warpgroups of 168 registers use the pool up: 40 + 2 * 232 fits it, 40 + 2 * 240 does not.
  if (warp_of_thread() < 4)
    registers_decrease<40>();
  else if (wrong)
    registers_increase<240>();
  else
    registers_increase<232>();
}
void arrival_at_a_block_that_exited(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 0) {
    if (threadIdx.x == 0) barrier_arrive_remote(barrier, 1);
  } else if (!wrong) {
    barrier_wait(barrier, 0);
  }
}
void cluster_not_synchronised(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  if (!wrong) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x == 0) barrier_arrive_remote(barrier, 1 - cluster_rank());
  barrier_wait(barrier, 0);
}
void grid_needs_all_blocks_at_once(bool wrong) {
  // With room for two of four blocks, the last one never starts while the others wait for it.
  const uint32_t awaited = wrong ? gridDim.x - 1 : 0;
  if (blockIdx.x == awaited) {
    if (threadIdx.x == 0) store_release(memory.flags, 1);
  } else {
    while (load_acquire(memory.flags) == 0) {
    }
  }
}
void dependent_reads_early(bool wrong) {
  if (!wrong) grid_wait_dependency();
  load_global(memory.out + threadIdx.x);
}
void ticket_taken_early(bool wrong) {
  if (!wrong) grid_wait_dependency();
  if (threadIdx.x == 0) atomic_add(memory.flags, 1);
}
void write_first_kernel() {
  grid_launch_dependents();
  if (threadIdx.x == 0) store_global(memory.flags, 0u);
  store_global(memory.out + threadIdx.x, uint16_t{1});
}

}  // namespace
}  // namespace emu

// More kernels of misuse.cpp: patterns of real kernels, which the emulator has to let pass, each
// beside the mistake that looks like it.
#pragma once
#include "misuse_kernels.h"

namespace emu {
namespace {

// ---- shared memory and barriers

void sums_of_warps(bool wrong) {
  const uint32_t sums = shared_base();
  if (lane_of_thread() == 0) store_shared(sums + warp_of_thread() * 4, 1.0f);
  if (!wrong) block_sync();
  load_shared(sums + lane_of_thread() % 4 * 4);
}
void half_written(bool wrong) {
  const uint32_t own = shared_base() + threadIdx.x * 8;
  store_shared(own, 1.0f);
  load_shared(own + (wrong ? 4 : 0));
}
void barriers_of_two_warps(bool wrong) {
  const uint32_t barriers = shared_base();
  if (lane_of_thread() == 0 && warp_of_thread() < 2)
    barrier_init(barriers + (wrong ? 0 : warp_of_thread() * 8), 1);
  block_sync();
}
void barrier_overwritten(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  fill_tile(shared_base() + kTile + (wrong ? 64 : 0));
  block_sync();
  if (threadIdx.x == 0) barrier_arrive(barrier);
  barrier_wait(barrier, 0);
}
void init_as_in_the_guide(bool wrong) {
  const uint32_t barrier = shared_base() + 2 * kTile;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    if (!wrong) fence_async_shared();
  }
  block_sync();
  if (threadIdx.x == 0) start_load(barrier);
  barrier_wait(barrier, 0);
}
void load_never_waited_for(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier, kTile);
    tma_load(shared_base(), &in_map, barrier, 0, 0);
    if (!wrong) barrier_wait(barrier, 0);
  }
}
void sync_after_some_exited(bool wrong) {
  if (warp_of_thread() == 3) return;
  if (wrong)
    named_barrier_sync<1>(128);
  else
    block_sync();
}
void cluster_sync_after_some_exited(bool wrong) {
  cluster_arrive();
  cluster_wait();
  if (warp_of_thread() == 3) return;
  cluster_arrive();
  if (wrong) cluster_arrive();
  cluster_wait();
}
// A stage is released by one thread of the warpgroup, right after its own wait.
void released_by_one_thread(bool wrong) {
  float d[32] = {};
  const uint32_t tile = shared_base(), full = tile + 2 * kTile, empty = full + 8;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 1);
    barrier_init_fence();
  }
  block_sync();
  if (warp_of_thread() == 4) {
    if (lane_of_thread() != 0) return;
    for (uint32_t i = 0; i < 2; ++i) {
      if (i > 0) barrier_wait(empty, 0);
      barrier_arrive_expect(full, kTile);
      tma_load(tile, &in_map, full, 0, 0);
    }
    return;
  }
  for (uint32_t i = 0; i < 2; ++i) {
    barrier_wait(full, i);
    multiply_tile(d, tile);
    if (wrong && threadIdx.x == 0) barrier_arrive(empty);
    wgmma_wait<0>();
    if (!wrong && threadIdx.x == 0) barrier_arrive(empty);
  }
}

// ---- flags

void one_flag_read_twice(bool wrong) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0 && !wrong) store_release(memory.flags, 1);
  } else {
    for (int i = 0; i < 200; ++i)
      while (load_acquire(memory.flags) == 0) {
      }
  }
}
void two_flags_polled(bool wrong) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) store_release(memory.flags, 1);
    block_sync();
    if (threadIdx.x == 0 && !wrong) store_release(memory.flags + 1, 1);
  } else if (threadIdx.x == 0) {
    while (load_acquire(memory.flags) == 0 || load_acquire(memory.flags + 1) == 0) {
    }
  }
}
// Two blocks write, and count themselves; the third one reads what both wrote.
void count_two_blocks(bool releases, bool waits_for_others) {
  if (blockIdx.x < 2) {
    store_global(memory.out + blockIdx.x * 128 + threadIdx.x, uint16_t{1});
    if (waits_for_others) block_sync();
    if (threadIdx.x == 64 && releases) ptx::add_release(memory.flags, 1);
    if (threadIdx.x == 64 && !releases) atomic_add(memory.flags, 1);
    return;
  }
  while (load_acquire(memory.flags) < 2) {
  }
  load_global(memory.out + threadIdx.x);
  load_global(memory.out + 128 + threadIdx.x);
}
void counted_without_release(bool wrong) { count_two_blocks(!wrong, true); }
void counted_before_barrier(bool wrong) { count_two_blocks(true, !wrong); }
// Ordinary writes of one block that TMA reads in another: both sides fence.
void relay(bool writer_fences, bool reader_fences) {
  if (blockIdx.x == 0) {
    for (uint32_t i = threadIdx.x; i < 64 * 64; i += 128) store_global(memory.out + i, uint16_t{1});
    if (writer_fences) fence_async_global();
    block_sync();
    if (threadIdx.x == 0) store_release(memory.flags, 1);
    return;
  }
  const uint32_t barrier = make_barrier(1);
  if (threadIdx.x == 0) {
    while (load_acquire(memory.flags) == 0) {
    }
    if (reader_fences) fence_async_global();
    barrier_arrive_expect(barrier, kTile);
    tma_load(shared_base(), &out_map, barrier, 0, 0);
  }
  barrier_wait(barrier, 0);
}
void relay_without_writers_fence(bool wrong) { relay(!wrong, true); }
void relay_without_readers_fence(bool wrong) { relay(true, !wrong); }

// ---- proxies

void cp_async_into_wgmma(bool wrong) {
  float d[32] = {};
  const uint32_t tile = shared_base();
  for (uint32_t i = threadIdx.x; i < kTile / 16; i += 128)
    cp_async_16(tile + i * 16, memory.in + i * 8, 16);
  cp_async_commit();
  cp_async_wait<0>();
  if (!wrong) fence_async_shared();
  block_sync();
  multiply_tile(d, tile);
  wgmma_wait<0>();
}
void cp_async_source_overwritten(bool wrong) {
  uint16_t* own = memory.out + threadIdx.x * 8;
  for (int i = 0; i < 8; ++i) store_global(own + i, uint16_t{1});
  cp_async_16(shared_base() + threadIdx.x * 16, own, 16);
  cp_async_commit();
  if (!wrong) cp_async_wait<0>();
  store_global(own, uint16_t{2});
  if (wrong) cp_async_wait<0>();
}
void cp_async_not_committed(bool wrong) {
  cp_async_16(shared_base() + threadIdx.x * 16, memory.in, 16);
  if (!wrong) cp_async_commit();
  cp_async_wait<0>();
}
void fence_of_the_other_space(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  if (wrong)
    fence_async_global();
  else
    fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) store_tile(out_map, tile);
}
void fence_by_one_lane(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  warp_sync();
  if (!wrong || lane_of_thread() == 0) fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) store_tile(out_map, tile);
}
// The box leaves the matrix: rows and columns outside need not be there.
void clipped_store(bool wrong) {
  static TensorMap narrow{memory.out, 64, 40, 64, 64, 64};
  const uint32_t tile = shared_base();
  const uint32_t rows = wrong ? 39 : 40, zeros[4] = {};
  for (uint32_t i = threadIdx.x; i < rows * 8; i += 128) store_shared_x4(tile + i * 16, zeros);
  fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) store_tile(narrow, tile);
}
void waited_for_by_another_lane(bool wrong) {
  const uint32_t tile = shared_base();
  fill_tile(tile);
  fence_async_shared();
  block_sync();
  if (threadIdx.x == 0) {
    tma_store(&out_map, tile, 0, 0);
    tma_store_commit();
  }
  if (threadIdx.x == (wrong ? 1 : 0)) tma_store_wait_read<0>();
}

// ---- vectors in global memory

void four_floats_off_their_boundary(bool wrong) {
  float v[4];
  load_global_x4(v, reinterpret_cast<const float*>(memory.in) + 4 * threadIdx.x + (wrong ? 2 : 0));
}
void two_floats_off_their_boundary(bool wrong) {
  auto* own = reinterpret_cast<float*>(memory.out) + 4 * threadIdx.x;
  store_global_pair(own + (wrong ? 1 : 2), 1.0f, 2.0f);
}

// ---- tensor cores

void accumulators_kept(bool wrong) {
  float d[32] = {};
  const uint32_t tile = load_tile();
  const uint64_t operand = k_major_descriptor(tile);
  multiply_tile(d, tile);
  wgmma<bf16, 0, 0>(d, operand, operand, true);
  wgmma_commit();
  if (wrong)
    wgmma_wait<0>();  // the registers come back, and may have been written
  else
    wgmma_wait<1>();  // the same accumulators stay in use: no new fence
  wgmma<bf16, 0, 0>(d, operand, operand, true);
  wgmma_commit();
  wgmma_wait<0>();
}
void fence_before_the_fragment(bool wrong) {
  float d[32] = {};
  uint32_t a[4];
  const uint32_t tile = load_tile();
  if (wrong) wgmma_fence();
  load_matrix_x4(a, tile + lane_of_thread() * 16);
  if (!wrong) wgmma_fence();
  wgmma<bf16, 0>(d, a, k_major_descriptor(tile), true);
  wgmma_commit();
  wgmma_wait<0>();
}
void three_warps_of_four(bool wrong) {
  float d[32] = {};
  const uint32_t tile = load_tile();
  if (wrong && warp_of_thread() == 3) return;
  multiply_tile(d, tile);
  wgmma_wait<0>();
}
void transposition_differs(bool wrong) {
  float d[32] = {};
  const uint64_t operand = k_major_descriptor(load_tile());
  wgmma_fence();
  if (wrong && warp_of_thread() == 3)
    wgmma<bf16, 1, 0>(d, operand, operand, true);
  else
    wgmma<bf16, 0, 0>(d, operand, operand, true);
  wgmma_commit();
  wgmma_wait<0>();
}
void registers_of_one_warp(bool wrong) {
  if (warp_of_thread() < 4)
    registers_decrease<40>();
  else if (!wrong || warp_of_thread() % 4 == 0)
    registers_increase<232>();
}

// ---- words stored into another block

// Block 0 hands block 1 a word, and is told that it was read.
void tell_block_1(uint32_t bytes, bool cluster_scope, bool waits_for_reply) {
  const uint32_t word = shared_base(), told = shared_base() + 8, heard = shared_base() + 16;
  if (threadIdx.x == 0) {
    barrier_init(told, 1);
    barrier_init(heard, 1);
    barrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0 && cluster_rank() == 0) {
    for (uint32_t turn = 0; turn < 2; ++turn) {
      if (turn > 0 && waits_for_reply) barrier_wait(heard, 0);
      store_async(word, turn, told, 1);
    }
  } else if (threadIdx.x == 0) {
    for (uint32_t turn = 0; turn < 2; ++turn) {
      barrier_arrive_expect(told, bytes);
      if (cluster_scope)
        barrier_wait_cluster(told, turn);
      else
        barrier_wait(told, turn);
      load_shared_word(word);
      barrier_arrive_remote(heard, 0);
    }
  }
  warp_sync();
  cluster_arrive();
  cluster_wait();
}
void word_waited_for_in_block_scope(bool wrong) { tell_block_1(4, !wrong, true); }
void word_of_eight_bytes(bool wrong) { tell_block_1(wrong ? 8 : 4, true, true); }
void word_overwritten_before_it_was_read(bool wrong) { tell_block_1(4, true, !wrong); }
// Each block of a cluster reads what the next one wrote.
void read_next_block(bool waits_before, bool waits_after) {
  const uint32_t mine = shared_base() + threadIdx.x * 16;
  const float ones[4] = {1, 1, 1, 1};
  float v[4];
  store_shared_x4(mine, ones);
  if (waits_before) {
    cluster_arrive();
    cluster_wait();
  }
  load_shared_remote_x4(v, mine, (cluster_rank() + 1) % 4);
  if (waits_after) {
    cluster_arrive();
    cluster_wait();
  }
}
void read_in_another_block_early(bool wrong) { read_next_block(!wrong, true); }
void left_while_another_block_reads(bool wrong) { read_next_block(true, !wrong); }
void elected_lane_runs_into_a_barrier(bool wrong) {
  if (warp_of_thread() == 0 && elect_one()) store_shared_word(shared_base(), 1);
  if (!wrong) warp_sync();
  cluster_arrive();
  cluster_wait();
}
void barrier_of_two_sizes(bool wrong) {
  // Not at once: but what orders the two uses may be late one day.
  named_barrier_sync<1>(128);
  block_sync();
  if (warp_of_thread() >= 2) return;
  if (wrong)
    named_barrier_sync<1>(64);
  else
    named_barrier_sync<2>(64);
}
void dependent_does_not_wait(bool wrong) {
  if (!wrong) grid_wait_dependency();
  block_sync();
}
void written_by_the_elected_lane(bool wrong) {
  const uint32_t barrier = make_barrier(1);
  if (warp_of_thread() == 0 && elect_one()) {
    store_shared_word(shared_base(), 1);
    barrier_arrive(barrier);
  }
  warp_sync();
  if (!wrong || warp_of_thread() == 0) barrier_wait(barrier, 0);
  load_shared_word(shared_base());
}

}  // namespace
}  // namespace emu

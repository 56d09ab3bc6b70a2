// How persistent clusters share out numbered items of work, in order, and wait for one another's
// results.
//
// Progress, where an item waits only for items of smaller numbers: items are claimed in order, each
// by a cluster that runs, and a cluster works in the order of its claims. So let i be the smallest
// item that is claimed and not complete: those its cluster claimed before it are smaller, so they
// are complete; those it waits for are smaller, so they were claimed, and are complete. Nothing
// holds i up. No other cluster has to be resident for it, nor any other grid.
//
// Determinism. Who claims an item and when has no part in its result.
#pragma once
#include "ptx.cuh"

namespace lora_kernels {

constexpr uint32_t kNoItem = ~0u;

// Both producers of a cluster ask for the next item: rank 0 takes it, rank 1 hears of it. The
// ticket is zero once the kernel ahead is complete.
template <class Ring>
struct Claims {
  const Ring& ring;
  uint32_t* counter;
  uint32_t items;
  uint32_t turn = 0, ticket = 0;

  __device__ uint32_t word() const { return ring.extra(); }        // in block 1: the item
  __device__ uint32_t told() const { return ring.extra() + 8; }    // in block 1
  __device__ uint32_t heard() const { return ring.extra() + 16; }  // in block 0

  __device__ void initialise() const {
    ptx::barrier_init(told(), 1);
    ptx::barrier_init(heard(), 1);
  }
  __device__ void ask() { ticket = ptx::atomic_add(counter, 1); }
  __device__ uint32_t next(uint32_t rank) {
    uint32_t item;
    if (rank == 0) {
      item = ticket < items ? ticket : kNoItem;
      if (turn > 0) ptx::barrier_wait(heard(), (turn - 1) & 1);
      ptx::store_async(word(), item, told(), 1);
    } else {
      ptx::barrier_arrive_expect(told(), 4);
      ptx::barrier_wait_cluster(told(), turn & 1);
      item = ptx::load_shared_word(word());
      // The reply to block 0's next word takes longer than the load above, and is what orders them:
      // an arrival of cluster scope would cost a GPU-wide fence.
      ptx::barrier_arrive_remote(heard(), 0);
    }
    ++turn;
    return item;
  }
};

// Until so many have been added to a counter; orders what was released into it before what this
// thread does next.
__device__ __forceinline__ void wait_for_count(const uint32_t* counter, uint32_t count) {
  while (ptx::load_acquire(counter) < count) {
  }
}
__device__ __forceinline__ void wait_for_flag(const uint32_t* flag) {
  wait_for_count(flag, 1);
  ptx::fence_async_global();  // TMA is to see what the flag says is there
}

}  // namespace lora_kernels

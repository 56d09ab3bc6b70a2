// The executable model of csrc/cuda/ptx.cuh: same names, same arguments, for g++.
//
// Every function also takes the place of its call, by default argument, so that a report names the
// line of the kernel.
#pragma once
#include "async.h"
#include "cuda.h"
#include "descriptor.h"
#include "numbers.h"
#include "tensor.h"

#define LK_PTX inline

namespace lora_kernels::ptx {

using bf16 = emu::Bf16;
using f16 = emu::F16;
using TensorMap = emu::TensorMap;
using emu::Place;
template <class T>
constexpr bool kIsBf16 = std::is_same_v<T, bf16>;

// ---- threads

LK_PTX uint32_t cluster_rank() { return emu::block().rank; }
LK_PTX uint32_t cluster_index() {
  return emu::block().index_x / emu::block().grid->launch->cluster;
}
LK_PTX uint32_t cluster_count() {
  const emu::Launch& l = *emu::block().grid->launch;
  return l.grid_x / l.cluster;
}
LK_PTX bool elect_one(Place at = Place::here()) { return emu::elect(at); }
LK_PTX uint32_t warp_uniform(uint32_t value, Place at = Place::here()) {
  return emu::shuffle_from_0(value, at);
}
LK_PTX void opaque(uint32_t&) {}
LK_PTX void warp_sync(Place at = Place::here()) { emu::sync_warp(at); }
LK_PTX void block_sync(Place at = Place::here()) { emu::sync_named(0, emu::kWholeBlock, true, at); }

// ---- shared and global memory

LK_PTX uint32_t shared_base() { return (emu::block().shared->base + 1023u) & ~1023u; }
LK_PTX float load_shared(uint32_t address, Place at = Place::here()) {
  float v;
  emu::block().shared->read(address, &v, 4, emu::generic_access("ld.shared", at));
  return v;
}
LK_PTX void store_shared(uint32_t address, float value, Place at = Place::here()) {
  emu::block().shared->write(address, &value, 4, emu::generic_access("st.shared", at));
}
LK_PTX uint32_t load_shared_word(uint32_t address, Place at = Place::here()) {
  uint32_t v;
  emu::block().shared->read(address, &v, 4, emu::generic_access("ld.shared", at));
  return v;
}
LK_PTX void store_shared_word(uint32_t address, uint32_t value, Place at = Place::here()) {
  emu::block().shared->write(address, &value, 4, emu::generic_access("st.shared", at));
}
LK_PTX void load_shared_x4(uint32_t (&v)[4], uint32_t address, Place at = Place::here()) {
  if (address % 16 != 0) emu::machine->fail("ld.shared.v4 off its 16-byte boundary", at);
  emu::block().shared->read(address, v, 16, emu::generic_access("ld.shared.v4", at));
}
LK_PTX void store_shared_x4(uint32_t address, const uint32_t (&v)[4], Place at = Place::here()) {
  emu::block().shared->write(address, v, 16, emu::generic_access("st.shared.v4", at));
}
LK_PTX void store_shared_x4(uint32_t address, const float (&v)[4], Place at = Place::here()) {
  emu::block().shared->write(address, v, 16, emu::generic_access("st.shared.v4", at));
}
LK_PTX void load_shared_x4(float (&v)[4], uint32_t address, Place at = Place::here()) {
  emu::block().shared->read(address, v, 16, emu::generic_access("ld.shared.v4", at));
}
LK_PTX void load_shared_remote_x4(float (&v)[4], uint32_t address, uint32_t rank,
                                  Place at = Place::here()) {
  emu::load_remote(v, address, 16, rank, at);
}
LK_PTX uint16_t load_global(const uint16_t* address, Place at = Place::here()) {
  uint16_t v;
  emu::global.read(address, &v, 2, emu::generic_access("ld.global", at));
  emu::machine->statistics.bytes_loaded += 2;
  return v;
}
template <class T>
LK_PTX void store_global(T* address, T value, Place at = Place::here()) {
  emu::global.write(address, &value, sizeof(T), emu::generic_access("st.global", at));
}

LK_PTX void load_global_x4(float (&v)[4], const float* address, Place at = Place::here()) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emu::machine->fail("ld.global.v4 off its 16-byte boundary", at);
  emu::global.read(address, v, 16, emu::generic_access("ld.global.v4", at));
  emu::machine->statistics.bytes_loaded += 16;
}
LK_PTX void store_global_x4(uint16_t* address, const uint32_t (&v)[4], Place at = Place::here()) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emu::machine->fail("st.global.v4 off its 16-byte boundary", at);
  emu::global.write(address, v, 16, emu::generic_access("st.global.v4", at));
}
LK_PTX void store_global_pair(float* address, float first, float second, Place at = Place::here()) {
  const float both[2] = {first, second};
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0)
    emu::machine->fail("st.global.v2 off its 8-byte boundary", at);
  emu::global.write(address, both, 8, emu::generic_access("st.global.v2", at));
}

// ---- flags and tickets in global memory

LK_PTX uint32_t load_acquire(const uint32_t* flag, Place at = Place::here()) {
  return emu::acquire_flag(flag, at);
}
LK_PTX void store_release(uint32_t* flag, uint32_t value, Place at = Place::here()) {
  emu::release_flag(flag, value, at);
}
LK_PTX uint32_t atomic_add(uint32_t* counter, uint32_t value, Place at = Place::here()) {
  return emu::add_to(counter, value, at);
}

LK_PTX void add_release(uint32_t* counter, uint32_t value, Place at = Place::here()) {
  emu::add_release(counter, value, at);
}

// ---- fences

LK_PTX void fence_async_shared() { emu::fence_proxy(emu::Space::shared); }
LK_PTX void fence_async_global() { emu::fence_proxy(emu::Space::global); }

// ---- barriers

template <int kBarrier>
LK_PTX void named_barrier_sync(uint32_t threads, Place at = Place::here()) {
  emu::sync_named(kBarrier, threads, true, at);
}
template <int kBarrier>
LK_PTX void named_barrier_arrive(uint32_t threads, Place at = Place::here()) {
  emu::sync_named(kBarrier, threads, false, at);
}
LK_PTX void cluster_arrive(Place at = Place::here()) { emu::arrive_cluster(at); }
LK_PTX void cluster_wait(Place at = Place::here()) { emu::wait_cluster(at); }
LK_PTX void barrier_init(uint32_t barrier, uint32_t arrivals, Place at = Place::here()) {
  emu::init_barrier(barrier, arrivals, at);
}
LK_PTX void barrier_init_fence(Place at = Place::here()) { emu::fence_barrier_init(at); }
LK_PTX void barrier_arrive(uint32_t barrier, Place at = Place::here()) {
  emu::arrive_barrier(barrier, emu::block().rank, at);
}
LK_PTX void barrier_arrive_remote(uint32_t barrier, uint32_t rank, Place at = Place::here()) {
  emu::arrive_barrier(barrier, rank, at);
}
LK_PTX void store_async(uint32_t address, uint32_t value, uint32_t barrier, uint32_t rank,
                        Place at = Place::here()) {
  emu::store_remote(address, value, barrier, rank, at);
}
LK_PTX void barrier_arrive_expect(uint32_t barrier, uint32_t bytes, Place at = Place::here()) {
  emu::arrive_expect(barrier, bytes, at);
}
LK_PTX void barrier_wait(uint32_t barrier, uint32_t parity, Place at = Place::here()) {
  emu::wait_barrier(barrier, parity, false, at);
}
LK_PTX void barrier_wait_cluster(uint32_t barrier, uint32_t parity, Place at = Place::here()) {
  emu::wait_barrier(barrier, parity, true, at);
}

// ---- asynchronous copies

LK_PTX void cp_async_16(uint32_t destination, const void* source, uint32_t bytes,
                        Place at = Place::here()) {
  emu::copy_async(destination, source, bytes, at);
}
LK_PTX void cp_async_commit() { emu::commit_copies(); }
template <int kPending>
LK_PTX void cp_async_wait(Place at = Place::here()) {
  emu::wait_copies(kPending, at);
}
LK_PTX void prefetch_tensor_map(const TensorMap*) {}
LK_PTX void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int column,
                     int row, Place at = Place::here()) {
  const auto own = static_cast<uint16_t>(1u << emu::block().rank);
  emu::load_tensor(destination, *map, barrier, column, row, own, at);
}
LK_PTX void tma_load_multicast(uint32_t destination, const TensorMap* map, uint32_t barrier,
                               int column, int row, uint16_t blocks, Place at = Place::here()) {
  emu::load_tensor(destination, *map, barrier, column, row, blocks, at);
}
LK_PTX void tma_store(const TensorMap* map, uint32_t source, int column, int row,
                      Place at = Place::here()) {
  emu::store_tensor(*map, source, column, row, at);
}
LK_PTX void tma_store_commit() { emu::commit_stores(); }
template <int kPending>
LK_PTX void tma_store_wait_read(Place at = Place::here()) {
  emu::wait_stores(kPending, true, at);
}
template <int kPending>
LK_PTX void tma_store_wait(Place at = Place::here()) {
  emu::wait_stores(kPending, false, at);
}

// ---- matrix fragments

LK_PTX void load_matrix_x4(uint32_t (&r)[4], uint32_t address, Place at = Place::here()) {
  emu::load_matrices(r, address, false, at);
}
LK_PTX void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address,
                                      Place at = Place::here()) {
  emu::load_matrices(r, address, true, at);
}
LK_PTX void store_matrix_x4(uint32_t address, const uint32_t (&r)[4], Place at = Place::here()) {
  emu::store_matrices(address, r, at);
}
LK_PTX uint32_t transpose_matrix(uint32_t matrix, Place at = Place::here()) {
  return emu::turn_matrix(matrix, at);
}
template <class T>
LK_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T,
                         Place at = Place::here()) {
  emu::multiply(d, a, b0, b1, kIsBf16<T>, at);
}
template <class T>
LK_PTX uint32_t pack(float low, float high, T type) {
  return emu::round_bits(low, type) | static_cast<uint32_t>(emu::round_bits(high, type)) << 16;
}
template <class T>
LK_PTX float widen(uint16_t bits, T) {
  return emu::to_float(T{bits});
}
// By the instruction's definition, a comparison of fp16 numbers, not by what it is used for.
LK_PTX uint32_t halves_at_least(uint32_t bits, uint32_t threshold) {
  uint32_t r = 0;
  for (int i = 0; i < 2; ++i) {
    const emu::F16 value{static_cast<uint16_t>(bits >> 16 * i)};
    const emu::F16 bound{static_cast<uint16_t>(threshold >> 16 * i)};
    if (emu::to_float(value) >= emu::to_float(bound)) r |= 0xffffu << 16 * i;
  }
  return r;
}

// ---- wgmma

LK_PTX void wgmma_fence(Place at = Place::here()) { emu::fence_wgmma(at); }
LK_PTX void wgmma_commit(Place at = Place::here()) { emu::commit_wgmmas(at); }
template <int kPending>
LK_PTX void wgmma_wait(Place at = Place::here()) {
  emu::wait_wgmmas(kPending, at);
}
template <int kCount>
LK_PTX void wgmma_keep(float (&)[kCount]) {}
LK_PTX void wgmma_keep(uint32_t (&)[4]) {}
template <class T, int kTransA, int kTransB, int kCount>
LK_PTX void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate,
                  Place at = Place::here()) {
  emu::issue_wgmma(d, kCount, nullptr, a, b, kTransA, kTransB, accumulate, kIsBf16<T>, at);
}
template <class T, int kTransB, int kCount>
LK_PTX void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                  Place at = Place::here()) {
  emu::issue_wgmma(d, kCount, a, 0, b, false, kTransB, accumulate, kIsBf16<T>, at);
}

// ---- registers, launches

template <int kRegisters>
LK_PTX void registers_decrease(Place at = Place::here()) {
  emu::change_registers(kRegisters, false, at);
}
template <int kRegisters>
LK_PTX void registers_increase(Place at = Place::here()) {
  emu::change_registers(kRegisters, true, at);
}
LK_PTX void grid_launch_dependents() { emu::launch_dependents(); }
LK_PTX void grid_wait_dependency(Place at = Place::here()) { emu::wait_dependency(at); }

}  // namespace lora_kernels::ptx

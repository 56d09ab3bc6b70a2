// The PTX instructions of every kernel, one function an instruction.
//
// g++ takes the executable model of each function instead: tests/emulator/ptx.h, same names, same
// arguments. A kernel touches shared memory, and global memory that another thread may touch, only
// through this header, so that the model sees every access.
//
// Shared memory is addressed by 32 bits in the shared window, as instructions take it. Numbers are
// bytes unless their name says otherwise.
#pragma once
#ifndef __CUDACC__
#include "emulator/ptx.h"
#else
#include <cuda.h>

#include <cstdint>

#include "descriptor.h"

#define LK_PTX __device__ __forceinline__

namespace lora_kernels::ptx {

// Name a type of 16 bits; the runtime's own headers would take every compilation longer to read.
struct bf16 {};
struct f16 {};
using TensorMap = CUtensorMap;

// ---- threads ------------------------------------------------------------------------------------

LK_PTX uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
LK_PTX uint32_t cluster_index() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(r));
  return r;
}
LK_PTX uint32_t cluster_count() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(r));
  return r;
}
// True in one lane of the warp, always the same one: a branch on it is known to be a single
// thread's.
LK_PTX bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected));
  return elected != 0;
}
// The value that lane 0 of the warp has: tells the compiler that a branch on it is uniform.
LK_PTX uint32_t warp_uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }
// Hides a value from the compiler, which would else work out ahead of a loop what follows from it,
// and spill that.
LK_PTX void opaque(uint32_t& value) { asm volatile("" : "+r"(value)); }
LK_PTX void warp_sync() { __syncwarp(); }
LK_PTX void block_sync() { __syncthreads(); }

// ---- shared and global memory -------------------------------------------------------------------

// First 1024-byte boundary of the block's dynamic shared memory, whose launch adds 1024 for it.
LK_PTX uint32_t shared_base() {
  extern __shared__ uint8_t dynamic_shared[];
  uint32_t base =
      (static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)) + 1023u) & ~1023u;
  asm volatile("" : "+r"(base));  // kept in a register: ptxas would work it out again at every use
  return base;
}
LK_PTX float load_shared(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
LK_PTX void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
LK_PTX uint32_t load_shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
LK_PTX void store_shared_word(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
LK_PTX void store_shared_x4(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
LK_PTX void load_shared_x4(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
// Four at once, on a 16-byte boundary.
LK_PTX void store_shared_x4(uint32_t address, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}
LK_PTX void load_shared_x4(float (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}
// The same of what lies at this address in block `rank` of the cluster.
LK_PTX void load_shared_remote_x4(float (&v)[4], uint32_t address, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %4, %5;\n"
      " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
      : "r"(address), "r"(rank)
      : "memory");
#else
  __trap();
#endif
}
LK_PTX uint16_t load_global(const uint16_t* address) {
  uint16_t v;
  asm volatile("ld.global.b16 %0, [%1];" : "=h"(v) : "l"(address) : "memory");
  return v;
}

// Four at once, on a 16-byte boundary.
LK_PTX void load_global_x4(float (&v)[4], const float* address) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(address)
               : "memory");
}
LK_PTX void store_global(uint16_t* address, uint16_t value) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
}
LK_PTX void store_global(uint32_t* address, uint32_t value) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
LK_PTX void store_global(float* address, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}
// Eight 16-bit elements at once, on a 16-byte boundary.
LK_PTX void store_global_x4(uint16_t* address, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// Two at once, on an 8-byte boundary.
LK_PTX void store_global_pair(float* address, float first, float second) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(first), "f"(second)
               : "memory");
}

// ---- flags and tickets in global memory ---------------------------------------------------------

LK_PTX uint32_t load_acquire(const uint32_t* flag) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v;
}
LK_PTX void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// The value before; orders nothing.
LK_PTX uint32_t atomic_add(uint32_t* counter, uint32_t value) {
  uint32_t v;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(v)
               : "l"(counter), "r"(value)
               : "memory");
  return v;
}

// Publishes what this thread wrote, or knows of, to whoever reads the counter by load_acquire.
LK_PTX void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// ---- fences -------------------------------------------------------------------------------------

// Orders the writes of this thread before later accesses of the async proxy (TMA, wgmma).
LK_PTX void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
LK_PTX void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- barriers -----------------------------------------------------------------------------------

// The immediate keeps ptxas from reserving all 16 barriers.
template <int kBarrier>
LK_PTX void named_barrier_sync(uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}
template <int kBarrier>
LK_PTX void named_barrier_arrive(uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}
// Before sm_90 there are no clusters.
LK_PTX void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
LK_PTX void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

LK_PTX void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes this thread's inits visible to the async proxy and to the cluster.
LK_PTX void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
LK_PTX void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// On the barrier at the same address in another block of the cluster. The scope is left at the
// default, .cta, since nvcc 13.0 turns a spelt-out .release.cluster into a GPU-wide memory barrier:
// enough to say that this block has read a slot, not to hand written data to the other block.
LK_PTX void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Writes a word into block `rank` of the cluster and completes 4 bytes of the barrier there. Both
// addresses are those of this block.
LK_PTX void store_async(uint32_t address, uint32_t value, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n .reg .b32 there, complete;\n mapa.shared::cluster.u32 there, %0, %3;\n"
      " mapa.shared::cluster.u32 complete, %2, %3;\n"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %1, [complete];\n}" ::
          "r"(address),
      "r"(value), "r"(barrier), "r"(rank)
      : "memory");
}
// Arrives and makes the phase wait for this many bytes more.
LK_PTX void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity is complete.
LK_PTX void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\n WAIT_%=:\n"
      " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra WAIT_%=;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// The same, for a phase that another block of the cluster has part in by ordinary stores.
LK_PTX void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\n WAIT_%=:\n"
      " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra WAIT_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- asynchronous copies ------------------------------------------------------------------------

// 16 bytes of which the first `bytes` come from source, the rest are zero.
LK_PTX void cp_async_16(uint32_t destination, const void* source, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(bytes)
               : "memory");
}
LK_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LK_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

LK_PTX void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
LK_PTX void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int column,
                     int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
// Into the same address, and onto the same barrier, of each block of the cluster in `blocks`.
LK_PTX void tma_load_multicast(uint32_t destination, const TensorMap* map, uint32_t barrier,
                               int column, int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
LK_PTX void tma_store(const TensorMap* map, uint32_t source, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(source), "r"(column), "r"(row)
      : "memory");
}
LK_PTX void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but kPending groups have read their shared memory.
template <int kPending>
LK_PTX void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all but kPending groups are complete.
template <int kPending>
LK_PTX void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrix fragments ---------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
LK_PTX void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
LK_PTX void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
LK_PTX void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// Transposes an 8x8 matrix of 16-bit elements that the warp holds as ldmatrix gives it.
LK_PTX uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(matrix));
  return r;
}

// d [16, 8] += a [16, 16] * b [16, 8], fragments as in the PTX ISA.
LK_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LK_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two fp32 values rounded to nearest even; `low` is the element at the lower address.
LK_PTX uint32_t pack(float low, float high, bf16) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
LK_PTX uint32_t pack(float low, float high, f16) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The value of 16 bits.
LK_PTX float widen(uint16_t bits, bf16) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
LK_PTX float widen(uint16_t bits, f16) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
// 0xffff in each half where bits >= threshold, else 0. Both are 14-bit integers: as fp16 bit
// patterns those are finite and in the order of the integers, so one HSET2 compares two.
LK_PTX uint32_t halves_at_least(uint32_t bits, uint32_t threshold) {
  uint32_t r;
  asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(r) : "r"(bits), "r"(threshold));
  return r;
}

// ---- wgmma --------------------------------------------------------------------------------------

LK_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LK_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
LK_PTX void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses of accumulators, or of a fragment, across the
// asynchronous section.
template <int kCount>
LK_PTX void wgmma_keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
LK_PTX void wgmma_keep(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

template <class T, int kCount>
struct Wgmma;
// d [64, 2 kCount] += a [64, 16] * b [16, 2 kCount], both operands through descriptors
// (SharedMatrix of descriptor.h); d = a * b unless `accumulate`. kTransA, kTransB: 1 where the
// operand's M or N dimension is the contiguous one, 0 where K is.
template <class T, int kTransA, int kTransB, int kCount>
LK_PTX void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T, kCount>::template run<kTransA, kTransB>(d, a, b, accumulate);
}
// The same with a in registers: each warp holds 16 rows of it, as fragments of mma.m16n8k16.
template <class T, int kTransB, int kCount>
LK_PTX void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<T, kCount>::template run<kTransB>(d, a, b, accumulate);
}

// clang-format off
#define LK_REGISTERS_0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LK_REGISTERS_8_15 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LK_REGISTERS_16_31 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LK_REGISTERS_32_63 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LK_REGISTERS_64_95 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LK_REGISTERS_96_127 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LK_OUT8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LK_OUT32(i) LK_OUT8(i), LK_OUT8(i + 8), LK_OUT8(i + 16), LK_OUT8(i + 24)

// O0..O6: the numbers of the operands behind the accumulators.
#define LK_WGMMA(T, NAME, N, COUNT, REGISTERS, O0, O1, O2, O3, O4, O5, O6, ...) \
  template <> struct Wgmma<T, COUNT> { \
    template <int kTransA, int kTransB> \
    static LK_PTX void run(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #O2 ", 0;\n" \
        " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, " \
        "%" #O0 ", %" #O1 ", p, 1, 1, %" #O3 ", %" #O4 ";\n}" : __VA_ARGS__ \
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransA), "n"(kTransB)); \
    } \
    template <int kTransB> \
    static LK_PTX void run(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, \
                           bool accumulate) { \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #O5 ", 0;\n" \
        " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, " \
        "{%" #O0 ", %" #O1 ", %" #O2 ", %" #O3 "}, %" #O4 ", p, 1, 1, %" #O6 ";\n}" : __VA_ARGS__ \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
          "n"(kTransB)); \
    } \
  };
#define LK_WGMMA_BOTH(...) \
  LK_WGMMA(bf16, "bf16", __VA_ARGS__) \
  LK_WGMMA(f16, "f16", __VA_ARGS__)

LK_WGMMA_BOTH(16, 8, LK_REGISTERS_0_7,
              8, 9, 10, 11, 12, 13, 14, LK_OUT8(0))
LK_WGMMA_BOTH(32, 16, LK_REGISTERS_0_7 LK_REGISTERS_8_15,
              16, 17, 18, 19, 20, 21, 22, LK_OUT8(0), LK_OUT8(8))
LK_WGMMA_BOTH(64, 32, LK_REGISTERS_0_7 LK_REGISTERS_8_15 LK_REGISTERS_16_31,
              32, 33, 34, 35, 36, 37, 38, LK_OUT32(0))
LK_WGMMA_BOTH(128, 64, LK_REGISTERS_0_7 LK_REGISTERS_8_15 LK_REGISTERS_16_31 LK_REGISTERS_32_63,
              64, 65, 66, 67, 68, 69, 70, LK_OUT32(0), LK_OUT32(32))
LK_WGMMA_BOTH(192, 96, LK_REGISTERS_0_7 LK_REGISTERS_8_15 LK_REGISTERS_16_31 LK_REGISTERS_32_63 LK_REGISTERS_64_95,
              96, 97, 98, 99, 100, 101, 102, LK_OUT32(0), LK_OUT32(32), LK_OUT32(64))
LK_WGMMA_BOTH(256, 128, LK_REGISTERS_0_7 LK_REGISTERS_8_15 LK_REGISTERS_16_31 LK_REGISTERS_32_63 LK_REGISTERS_64_95 LK_REGISTERS_96_127,
              128, 129, 130, 131, 132, 133, 134, LK_OUT32(0), LK_OUT32(32), LK_OUT32(64), LK_OUT32(96))
#undef LK_WGMMA_BOTH
#undef LK_WGMMA
// clang-format on

// ---- registers, launches ------------------------------------------------------------------------

// By all warps of a warpgroup: gives registers back to the block's pool, or takes more of it.
template <int kRegisters>
LK_PTX void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
LK_PTX void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Lets the next kernel of the stream start once every block has said so or has exited.
// Nothing before sm_90.
LK_PTX void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Until the kernel before is complete and its writes are visible.
LK_PTX void grid_wait_dependency() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace lora_kernels::ptx
#endif

// Kernels that use each mechanism of a persistent Hopper kernel once, and nothing else. They run in
// the emulator, where they test it, and on a GPU, where they test what the emulator assumes.
#pragma once
#include "cuda/dropout.cuh"
#include "cuda/ptx.cuh"

namespace lora_kernels {

// ---- c [M, N] = a b^T: cluster multicast, both majors of both operands, setmaxnreg, TMA stores --

struct GemmProbeArgs {
  int M, N, K;
};

template <class T_, int kN_, int kTransA_, int kTransB_>
struct GemmProbe {
  using T = T_;
  static constexpr int kN = kN_, kTransA = kTransA_, kTransB = kTransB_;
  static constexpr int kM = 128, kStages = 3, kThreads = 384, kCluster = 2;
  static constexpr uint32_t kABytes = kM * kRowBytes, kBBytes = kN * kRowBytes;
  static constexpr uint32_t kPanelBytes = kRowElements * kRowBytes;  // 64 columns of c, or of an MN
  static constexpr uint32_t kStageBytes = kABytes + kBBytes;
  static constexpr uint32_t kCBytes = kM * kN * 2;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes + kCBytes + 2 * kStages * 8 + 1024;
  static_assert(kN % 128 == 0, "each block of a cluster loads half of b's panels");
};

template <class P>
struct GemmProbeRing {
  uint32_t base = ptx::shared_base(), stage = 0, phase = 0;
  __device__ uint32_t a() const { return base + stage * P::kStageBytes; }
  __device__ uint32_t b() const { return a() + P::kABytes; }
  __device__ uint32_t c() const { return base + P::kStages * P::kStageBytes; }
  __device__ uint32_t full(uint32_t s) const { return c() + P::kCBytes + s * 8; }
  __device__ uint32_t empty(uint32_t s) const { return full(P::kStages) + s * 8; }
  __device__ void advance() {
    if (++stage == P::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Tile t of this block: the two blocks of a cluster take rows 256 t .. and the same columns.
struct GemmProbeTile {
  int row, column;
};
template <class P>
__device__ __forceinline__ GemmProbeTile tile_at(uint32_t t, int N) {
  const uint32_t columns = (N + P::kN - 1) / P::kN;
  return {static_cast<int>((t / columns * P::kCluster + ptx::cluster_rank()) * P::kM),
          static_cast<int>(t % columns * P::kN)};
}

template <class P>
__device__ __forceinline__ void load_probe_stage(const GemmProbeRing<P>& ring,
                                                 const ptx::TensorMap* a_map,
                                                 const ptx::TensorMap* b_map, GemmProbeTile t,
                                                 int k) {
  constexpr uint16_t kBoth = 3;
  const uint32_t full = ring.full(ring.stage), rank = ptx::cluster_rank();
  ptx::barrier_arrive_expect(full, P::kStageBytes);
  if constexpr (P::kTransA) {
    ptx::tma_load(ring.a(), a_map, full, t.row, k);
    ptx::tma_load(ring.a() + P::kPanelBytes, a_map, full, t.row + 64, k);
  } else {
    ptx::tma_load(ring.a(), a_map, full, k, t.row);
  }
  if constexpr (P::kTransB) {
    LK_UNROLL
    for (uint32_t p = 0; p < P::kN / 128; ++p) {
      const uint32_t panel = rank * (P::kN / 128) + p;
      ptx::tma_load_multicast(ring.b() + panel * P::kPanelBytes, b_map, full,
                              t.column + static_cast<int>(panel) * 64, k, kBoth);
    }
  } else {
    const int half = P::kN / 2 * static_cast<int>(rank);
    ptx::tma_load_multicast(ring.b() + rank * (P::kBBytes / 2), b_map, full, k, t.column + half,
                            kBoth);
  }
}

template <class P>
__device__ __forceinline__ void multiply_probe_stage(float (&acc)[P::kN / 2],
                                                     const GemmProbeRing<P>& ring, uint32_t group) {
  ptx::wgmma_keep(acc);
  ptx::wgmma_fence();
  LK_UNROLL
  for (uint32_t step = 0; step < kRowElements / kMmaDepth; ++step) {
    const uint32_t a = ring.a() + group * P::kPanelBytes;  // 64 rows, or one panel of 64 columns
    const uint64_t left = P::kTransA ? mn_major_descriptor(a + step * kMnMajorStep, P::kPanelBytes)
                                     : k_major_descriptor(a + step * kKMajorStep);
    const uint64_t right = P::kTransB
                               ? mn_major_descriptor(ring.b() + step * kMnMajorStep, P::kPanelBytes)
                               : k_major_descriptor(ring.b() + step * kKMajorStep);
    ptx::wgmma<typename P::T, P::kTransA, P::kTransB>(acc, left, right, true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_keep(acc);
}

// 64 rows of c through shared memory, in panels of 64 columns.
template <class P>
__device__ __forceinline__ void store_probe_tile(const float (&acc)[P::kN / 2],
                                                 const GemmProbeRing<P>& ring,
                                                 const ptx::TensorMap* c_map, GemmProbeTile t,
                                                 uint32_t group, uint32_t thread) {
  const uint32_t lane = thread % 32, warp = thread / 32;
  const auto sync = [&] {
    if (group == 0)
      ptx::named_barrier_sync<1>(128);
    else
      ptx::named_barrier_sync<2>(128);
  };
  const uint32_t panels = ring.c() + group * (P::kN / 64) * P::kPanelBytes;
  if (thread == 0) ptx::tma_store_wait_read<0>();
  sync();
  LK_UNROLL
  for (uint32_t n = 0; n < P::kN / 16; ++n) {
    uint32_t r[4];
    LK_UNROLL
    for (int i = 0; i < 4; ++i)
      r[i] = ptx::pack(acc[8 * n + 2 * i], acc[8 * n + 2 * i + 1], typename P::T{});
    const uint32_t row = warp * 16 + lane % 16, chunk = n % 4 * 2 + lane / 16;
    ptx::store_matrix_x4(
        panels + n / 4 * P::kPanelBytes + swizzled(row * kRowBytes + chunk * kChunkBytes), r);
  }
  ptx::fence_async_shared();
  sync();
  if (thread == 0) {
    LK_UNROLL
    for (uint32_t p = 0; p < P::kN / 64; ++p)
      ptx::tma_store(c_map, panels + p * P::kPanelBytes, t.column + static_cast<int>(p) * 64,
                     t.row + static_cast<int>(group) * 64);
    ptx::tma_store_commit();
  }
}

template <class P>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(P::kThreads, 1)
    gemm_probe(const __grid_constant__ ptx::TensorMap a_map,
               const __grid_constant__ ptx::TensorMap b_map,
               const __grid_constant__ ptx::TensorMap c_map, const GemmProbeArgs args) {
  GemmProbeRing<P> ring;
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  const uint32_t warpgroup = ptx::warp_uniform(thread / 128);
  const uint32_t blocks_k = (args.K + 63) / 64;
  const uint32_t tiles = ((args.M + 2 * P::kM - 1) / (2 * P::kM)) * ((args.N + P::kN - 1) / P::kN);

  if (thread == 0) {
    for (uint32_t s = 0; s < P::kStages; ++s) {
      ptx::barrier_init(ring.full(s), 1);
      ptx::barrier_init(ring.empty(s), 8 * P::kCluster);  // every consumer warp of both blocks
    }
    ptx::barrier_init_fence();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warpgroup == 0) {
    ptx::registers_decrease<40>();
    if (thread == 0) {
#pragma unroll 1
      for (uint32_t t = ptx::cluster_index(); t < tiles; t += ptx::cluster_count())
#pragma unroll 1
        for (uint32_t k = 0; k < blocks_k; ++k, ring.advance()) {
          ptx::barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
          load_probe_stage(ring, &a_map, &b_map, tile_at<P>(t, args.N), static_cast<int>(k * 64));
        }
    }
  } else {
    ptx::registers_increase<232>();
    const uint32_t group = warpgroup - 1;
#pragma unroll 1
    for (uint32_t t = ptx::cluster_index(); t < tiles; t += ptx::cluster_count()) {
      float acc[P::kN / 2] = {};
      uint32_t read = 0;  // the stage that the group in flight reads
#pragma unroll 1
      for (uint32_t k = 0; k < blocks_k; ++k, ring.advance()) {
        ptx::barrier_wait(ring.full(ring.stage), ring.phase);
        multiply_probe_stage(acc, ring, group);
        ptx::wgmma_wait<1>();
        if (k > 0 && lane < P::kCluster) ptx::barrier_arrive_remote(ring.empty(read), lane);
        read = ring.stage;
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_keep(acc);
      if (lane < P::kCluster) ptx::barrier_arrive_remote(ring.empty(read), lane);
      store_probe_tile(acc, ring, &c_map, tile_at<P>(t, args.N), group, thread % 128);
    }
    if (thread % 128 == 0) ptx::tma_store_wait<0>();
  }
  // Neither block leaves while the other may still signal it.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// ---- out = in through h: tickets, flags, generic writes that TMA reads in another block ---------

constexpr uint32_t kRelayTile = 64 * kRowBytes;

struct RelayProbeArgs {
  const uint16_t* in;  // [64 tiles, 64]
  uint16_t* h;         // the same
  uint32_t* ticket;    // 0
  uint32_t* flags;     // [tiles], 0
  int tiles;
};

// Items 0 .. tiles - 1 copy a tile of in to h by ordinary stores, the others copy it on to out by
// TMA. An item waits only for items with smaller numbers, which were claimed before it: so any
// number of blocks, resident or not, gets through.
__global__ void __launch_bounds__(128)
    relay_probe(const __grid_constant__ ptx::TensorMap h_map,
                const __grid_constant__ ptx::TensorMap out_map, const RelayProbeArgs args) {
  const uint32_t thread = threadIdx.x, tile = ptx::shared_base();
  const uint32_t barrier = tile + kRelayTile, claimed = barrier + 16;
  uint32_t phase = 0;
  if (thread == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
  }
  for (;;) {
    ptx::block_sync();  // the item before was read by all
    if (thread == 0) ptx::store_shared_word(claimed, ptx::atomic_add(args.ticket, 1));
    ptx::block_sync();
    const int item = static_cast<int>(ptx::load_shared_word(claimed));
    if (item >= 2 * args.tiles) break;
    if (item < args.tiles) {
      for (uint32_t i = thread; i < 64 * 64; i += 128) {
        const int64_t at = int64_t{item} * 64 * 64 + i;
        ptx::store_global(args.h + at, ptx::load_global(args.in + at));
      }
      ptx::fence_async_global();
      ptx::block_sync();
      if (thread == 0) ptx::store_release(args.flags + item, 1);
    } else if (thread == 0) {
      const int row = (item - args.tiles) * 64;
      while (ptx::load_acquire(args.flags + item - args.tiles) == 0) {
      }
      ptx::fence_async_global();
      ptx::barrier_arrive_expect(barrier, kRelayTile);
      ptx::tma_load(tile, &h_map, barrier, 0, row);
      ptx::barrier_wait(barrier, phase);
      phase ^= 1;
      ptx::tma_store(&out_map, tile, 0, row);
      ptx::tma_store_commit();
      ptx::tma_store_wait_read<0>();
    }
  }
  if (thread == 0) ptx::tma_store_wait<0>();
}

}  // namespace lora_kernels

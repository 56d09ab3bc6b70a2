// The main loop of fused_gemm: a ring of stages that one thread fills by TMA and two warpgroups
// multiply. Both kernels that compute y are made of these parts.
//
// A stage is 64 of the depth: this block's 128 rows of a, and the tile's rows of b, of which each
// block of the cluster loads half for both. So a stage is free once the consumers of both blocks
// have read it.
#pragma once
#include "fused_gemm_plan.h"
#include "ptx.cuh"

namespace lora_kernels {

template <class Tile_>
struct GemmRing {
  using Tile = Tile_;
  uint32_t base = ptx::shared_base(), stage = 0, phase = 0;

  __device__ uint32_t a() const { return base + stage * Tile::kStageBytes; }
  __device__ uint32_t b() const { return a() + Tile::kABytes; }
  // 64 by 64 elements of y on their way out.
  __device__ uint32_t panel(uint32_t group, uint32_t slot) const {
    return base + Tile::kStages * Tile::kStageBytes +
           (group * Tile::kStaged + slot) * Tile::kPanelBytes;
  }
  __device__ uint32_t bias(uint32_t group) const {
    return panel(Tile::kConsumers, 0) + group * Tile::kN * 2;
  }
  __device__ uint32_t full(uint32_t s) const { return bias(Tile::kConsumers) + s * 8; }
  __device__ uint32_t empty(uint32_t s) const { return full(Tile::kStages) + s * 8; }
  // Behind the barriers: what the work of a stage is, if the kernel says so, and 44 bytes for it.
  __device__ uint32_t item() const { return empty(Tile::kStages) + stage * 4; }
  __device__ uint32_t extra() const { return (empty(Tile::kStages) + Tile::kStages * 4 + 7) & ~7u; }

  __device__ void advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ void initialise() const {
    for (uint32_t s = 0; s < Tile::kStages; ++s) {
      ptx::barrier_init(full(s), 1);
      ptx::barrier_init(empty(s), 4 * Tile::kConsumers * Tile::kCluster);  // every consumer warp
    }
  }

  // The producer's side: waits for the stage to be free, says what will be loaded.
  __device__ void acquire() const { ptx::barrier_wait(empty(stage), phase ^ 1); }
  __device__ void expect(uint32_t bytes) const { ptx::barrier_arrive_expect(full(stage), bytes); }
  // The consumers' side.
  __device__ void wait() const { ptx::barrier_wait(full(stage), phase); }
  __device__ void release_previous(uint32_t lane) const {
    const uint32_t previous = (stage == 0 ? Tile::kStages : stage) - 1;
    if (lane < Tile::kCluster) ptx::barrier_arrive_remote(empty(previous), lane);
  }
};

// Loads the stage at hand: rows of a from `row`, kN rows of b from `column`, depth from k. An
// MN-major b comes as panels of 64 columns, of which each block loads half of the k-rows.
template <int kN, bool kMnMajor, class Ring>
__device__ __forceinline__ void load_stage(const Ring& ring, const ptx::TensorMap* a_map,
                                           const ptx::TensorMap* b_map, uint32_t row,
                                           uint32_t column, uint32_t k) {
  using Tile = typename Ring::Tile;
  constexpr uint16_t kBoth = 3;
  const uint32_t full = ring.full(ring.stage), rank = ptx::cluster_rank();
  ring.expect(Tile::kABytes + kN * kRowBytes);
  ptx::tma_load(ring.a(), a_map, full, static_cast<int>(k), static_cast<int>(row));
  if constexpr (kMnMajor) {
    constexpr uint32_t kHalf = kRowElements / 2;
    LK_UNROLL
    for (uint32_t p = 0; p < kN / 64; ++p)
      ptx::tma_load_multicast(ring.b() + p * Tile::kPanelBytes + rank * kHalf * kRowBytes, b_map,
                              full, static_cast<int>(column + p * 64),
                              static_cast<int>(k + rank * kHalf), kBoth);
  } else {
    constexpr uint32_t kHalf = kN / 2;
    ptx::tma_load_multicast(ring.b() + rank * kHalf * kRowBytes, b_map, full, static_cast<int>(k),
                            static_cast<int>(column + rank * kHalf), kBoth);
  }
}

// Loads `blocks` stages, each as soon as its place is free.
template <int kN, bool kMnMajor, class Ring>
__device__ __forceinline__ void load_blocks(Ring& ring, const ptx::TensorMap* a_map,
                                            const ptx::TensorMap* b_map, uint32_t blocks,
                                            uint32_t row, uint32_t column) {
#pragma unroll 1
  for (uint32_t block = 0; block < blocks; ++block, ring.advance()) {
    ring.acquire();
    load_stage<kN, kMnMajor>(ring, a_map, b_map, row, column, block * kRowElements);
  }
}

// The first use of a map finds it in the cache. It is a kernel parameter: nothing has to be waited
// for.
template <class... Maps>
__device__ __forceinline__ void prefetch_maps(uint32_t thread, const Maps*... maps) {
  if (thread == 0) (ptx::prefetch_tensor_map(maps), ...);
}

// One k16 step of the stage at hand: acc += 64 rows of a times 2 kCount columns of b.
template <class T, bool kMnMajor, class Ring, int kCount>
__device__ __forceinline__ void multiply_step(float (&acc)[kCount], const Ring& ring,
                                              uint32_t group, uint32_t step) {
  constexpr uint32_t kPanel = Ring::Tile::kPanelBytes;
  const uint64_t a = k_major_descriptor(ring.a() + group * kPanel + step * kKMajorStep);
  const uint64_t b = kMnMajor ? mn_major_descriptor(ring.b() + step * kMnMajorStep, kPanel)
                              : k_major_descriptor(ring.b() + step * kKMajorStep);
  ptx::wgmma<T, 0, kMnMajor>(acc, a, b, true);
}

// acc += the product over `blocks` stages; the last stage is not released yet. While the tensor
// cores are busy with a stage, meanwhile(its number) may use the other units.
template <class T, bool kMnMajor, class Ring, int kCount, class Meanwhile>
__device__ __forceinline__ void multiply_blocks(float (&acc)[kCount], Ring& ring, uint32_t blocks,
                                                uint32_t group, uint32_t lane,
                                                const Meanwhile& meanwhile) {
#pragma unroll 1
  for (uint32_t block = 0; block < blocks; ++block) {
    ring.wait();
    ptx::wgmma_keep(acc);
    ptx::wgmma_fence();
    LK_UNROLL
    for (uint32_t step = 0; step < kRowElements / kMmaDepth; ++step)
      multiply_step<T, kMnMajor>(acc, ring, group, step);
    ptx::wgmma_commit();
    ptx::wgmma_keep(acc);
    meanwhile(block);
    ptx::wgmma_wait<1>();  // the stage before was multiplied
    if (block > 0) ring.release_previous(lane);
    ring.advance();
  }
}

// acc += h up^T, `steps` k16 steps in stages of four: their loop is one of its own, since ptxas
// would serialise a group of wgmmas whose number is not a constant.
template <class T, bool kMnMajor, class Ring, int kCount>
__device__ __forceinline__ void multiply_rank(float (&acc)[kCount], Ring& ring, uint32_t steps,
                                              uint32_t group, uint32_t lane) {
  constexpr uint32_t kSteps = kRowElements / kMmaDepth;
#pragma unroll 1
  for (uint32_t first = 0; first < steps; first += kSteps) {
    ring.wait();
#pragma unroll 1
    for (uint32_t step = 0; step < kSteps && first + step < steps; ++step) {
      ptx::wgmma_keep(acc);
      ptx::wgmma_fence();
      multiply_step<T, kMnMajor>(acc, ring, group, step);
      ptx::wgmma_commit();
      ptx::wgmma_keep(acc);
    }
    ptx::wgmma_wait<1>();  // all but the last step, so the stage before was multiplied
    ring.release_previous(lane);
    ring.advance();
  }
}

// Until acc is there; then the last stage is free too.
template <class Ring, int kCount>
__device__ __forceinline__ void finish_product(float (&acc)[kCount], const Ring& ring,
                                               uint32_t lane) {
  ptx::wgmma_wait<0>();
  ptx::wgmma_keep(acc);
  ring.release_previous(lane);
}

}  // namespace lora_kernels

// The LoRA term of dx under dropout: mask/q sits on the term alone, so it cannot be more depth of
// the frozen product. Its operands come through the same ring; mma.sync multiplies them into
// registers of its own, since a second set of wgmma accumulators would serialise the main loop.
#pragma once
#include "dropout.cuh"
#include "fused_gemm_ring.cuh"

namespace lora_kernels {

// term = rows of h by 16 columns of up^T, of the stage at hand: fragments `a` of h, `up` where the
// panel of those columns begins, chunk the first of their two 16-byte chunks.
template <class T>
__device__ __forceinline__ void multiply_term(float (&term)[2][4], const uint32_t (&a)[4][4],
                                              uint32_t up, uint32_t chunk, uint32_t steps,
                                              uint32_t lane) {
  LK_UNROLL
  for (uint32_t s = 0; s < 4; ++s) {
    if (s >= steps) break;
    uint32_t b[4];
    const uint32_t offset =
        (s * kMmaDepth + lane % 16) * kRowBytes + (chunk + lane / 16) * kChunkBytes;
    ptx::load_matrix_x4_transposed(b, up + swizzled(offset));
    ptx::mma_m16n8k16(term[0], a[s], b[0], b[1], T{});
    ptx::mma_m16n8k16(term[1], a[s], b[2], b[3], T{});
  }
}

// What the mask keeps of a lane's part of the fragment at local column `column`: bit v for the even
// column of register v, 16 bits higher for the odd one.
__device__ __forceinline__ uint32_t draw_kept(const LaneDropout& dropout, uint32_t column,
                                              uint32_t lane) {
  uint32_t keep[4] = {~0u, ~0u, ~0u, ~0u}, bits = 0;
  apply_dropout(keep, dropout, column, draw_straddling(dropout, column, 0, 1, lane));
  LK_UNROLL
  for (uint32_t v = 0; v < 4; ++v) bits |= keep[v] & (0x10001u << v);
  return bits;
}

// The same of 16 rows by 64 kPanels columns: in word p for columns [64 p, 64 p + 64), of fragment n
// from bit 4 n on.
template <int kPanels>
struct KeptBits {
  static constexpr uint32_t kFragments = 4 * kPanels;
  uint32_t words[kPanels] = {};

  // Fragment n, whose first column is `column`. A draw is a long chain of dependent products: one
  // for each stage of the main loop costs nothing there.
  __device__ __forceinline__ void draw(const LaneDropout& dropout, uint32_t column, uint32_t n,
                                       uint32_t lane) {
    const uint32_t bits = draw_kept(dropout, column + n * 16, lane) << 4 * (n % 4);
    LK_UNROLL
    for (uint32_t p = 0; p < kPanels; ++p) words[p] |= n / 4 == p ? bits : 0;
  }
};

// Two n8 blocks of sums += scale * term where the mask keeps it: selected, never multiplied by 0.
__device__ __forceinline__ void add_kept(float* sums, const float (&term)[2][4], uint32_t kept,
                                         uint32_t n, float scale) {
  LK_UNROLL
  for (uint32_t e = 0; e < 8; ++e)
    if (kept >> (4 * n + e / 2 + 16 * (e % 2)) & 1) sums[e] += scale * term[e / 4][e % 4];
}

// acc += select(mask, scale * h up^T, 0) for `ranks` k16 steps of ranks in stages of four; acc is
// complete, and up is MN-major.
template <class T, class Ring, int kCount>
__device__ __forceinline__ void add_masked_rank(float (&acc)[kCount], Ring& ring, uint32_t ranks,
                                                KeptBits<kCount / 32>& kept, float scale,
                                                uint32_t group, uint32_t warp, uint32_t lane) {
  constexpr uint32_t kSteps = kRowElements / kMmaDepth, kPanel = Ring::Tile::kPanelBytes;
#pragma unroll 1
  for (uint32_t first = 0; first < ranks; first += kSteps) {
    ring.wait();
    uint32_t a[kSteps][4];
    LK_UNROLL
    for (uint32_t s = 0; s < kSteps; ++s) {
      const uint32_t offset =
          (warp * 16 + lane % 16) * kRowBytes + (s * 2 + lane / 16) * kChunkBytes;
      ptx::load_matrix_x4(a[s], ring.a() + group * kPanel + swizzled(offset));
    }
    LK_UNROLL
    for (uint32_t p = 0; p < kCount / 32; ++p) {
      ptx::opaque(kept.words[p]);
      LK_UNROLL
      for (uint32_t n = 0; n < 4; ++n) {
        float term[2][4] = {};
        multiply_term<T>(term, a, ring.b() + p * kPanel, n * 2, ranks - first, lane);
        add_kept(acc + p * 32 + n * 8, term, kept.words[p], n, scale);
      }
    }
    ring.advance();
    ring.release_previous(lane);
  }
}

}  // namespace lora_kernels

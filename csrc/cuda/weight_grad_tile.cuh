// What is done with 128 rows by 64 columns of x in shared memory, read once: a product of its rows
// for the down projection, one of its columns for the gradient, another for their sums. wgmma takes
// the same bytes either way: as rows of K, or, transposed, as panels.
#pragma once
#include "dropout.cuh"
#include "store_partials.cuh"

namespace lora_kernels {

constexpr uint32_t kStepsOfRows = 128 / kMmaDepth;  // of a stage, when its rows are the depth

// sum += 64 rows of x, a tile of 64 columns from `x` on, times `down`: panels of 64 of its columns,
// or kTurned, rows of ranks. Not complete on return.
template <class T, bool kTurned, int kCount>
__device__ __forceinline__ void multiply_rows(float (&sum)[kCount], uint32_t x, uint32_t down,
                                              bool accumulate) {
  const uint64_t a = k_major_descriptor(x);
  const uint64_t b =
      kTurned ? k_major_descriptor(down) : mn_major_descriptor(down, kRowElements * kRowBytes);
  ptx::wgmma_keep(sum);
  ptx::wgmma_fence();
  LK_UNROLL
  for (uint32_t step = 0; step < kRowElements / kMmaDepth; ++step)
    ptx::wgmma<T, 0, !kTurned>(sum, advanced(a, step * kKMajorStep),
                               advanced(b, step * (kTurned ? kKMajorStep : kMnMajorStep)),
                               accumulate || step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_keep(sum);
}

// grad [64 columns, 2 kCount ranks] += x^T h over the 128 rows of a stage; `h`: its first row, in
// panels of 64 ranks that are `panel` bytes apart, or kTurned, two tiles of 64 rows, each with a
// row for each rank. Not complete on return.
template <class T, bool kTurned, int kCount>
__device__ __forceinline__ void multiply_columns(float (&grad)[kCount], uint32_t x, uint32_t h,
                                                 uint32_t panel, bool accumulate) {
  constexpr uint32_t kStepsOfTile = kRowElements / kMmaDepth, kTile = 2 * kCount * kRowBytes;
  const uint64_t a = mn_major_descriptor(x, panel);
  const uint64_t b = kTurned ? k_major_descriptor(h) : mn_major_descriptor(h, panel);
  ptx::wgmma_keep(grad);
  ptx::wgmma_fence();
  LK_UNROLL
  for (uint32_t step = 0; step < kStepsOfRows; ++step) {
    const uint32_t turned = step / kStepsOfTile * kTile + step % kStepsOfTile * kKMajorStep;
    ptx::wgmma<T, 1, !kTurned>(grad, advanced(a, step * kMnMajorStep),
                               advanced(b, kTurned ? turned : step * kMnMajorStep),
                               accumulate || step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_keep(grad);
}

// sums += x^T ones, the same in all 16 columns of the result. Not complete on return.
template <class T>
__device__ __forceinline__ void multiply_ones(float (&sums)[8], uint32_t x, uint32_t ones,
                                              bool accumulate) {
  const uint64_t a = mn_major_descriptor(x, kAtomBytes), b = k_major_descriptor(ones);
  ptx::wgmma_keep(sums);
  ptx::wgmma_fence();
  LK_UNROLL
  for (uint32_t step = 0; step < kStepsOfRows; ++step)
    ptx::wgmma<T, 1, 0>(sums, advanced(a, step * kMnMajorStep), b, accumulate || step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_keep(sums);
}

// The tile of ones: 16 rows of 64.
template <class T>
__device__ __forceinline__ void write_ones(uint32_t ones, uint32_t thread, uint32_t threads) {
  const uint32_t two = ptx::pack(1.0f, 1.0f, T{});
#pragma unroll 1
  for (uint32_t i = thread; i < 16 * kRowBytes / 4; i += threads)
    ptx::store_shared_word(ones + i * 4, two);
  ptx::fence_async_shared();
}

// Selects 64 rows of x in place, 16 of them a warp; `column`: of x, where the tile starts. wgmma
// may read them once the threads of both warpgroups have met. Aligned fragments are drawn together:
// a draw alone is a chain of dependent products.
__device__ __forceinline__ void mask_rows(uint32_t x, const LaneDropout& dropout, uint32_t column,
                                          uint32_t warp, uint32_t lane) {
  constexpr uint32_t kSteps = kRowElements / kMmaDepth;
  const auto at = [&](uint32_t step) {
    return x + swizzled((warp * 16 + lane % 16) * kRowBytes + (step * 2 + lane / 16) * kChunkBytes);
  };
  if (dropout.aligned) {
    uint32_t a[kSteps][4];
    LK_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) ptx::load_matrix_x4(a[step], at(step));
    LK_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step)
      apply_aligned_dropout(a[step], dropout, column + step * kMmaDepth);
    LK_UNROLL
    for (uint32_t step = 0; step < kSteps; ++step) ptx::store_matrix_x4(at(step), a[step]);
  } else {
#pragma unroll 1
    for (uint32_t step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      ptx::load_matrix_x4(a, at(step));
      select_kept(a, draw_any_dropout(dropout, column + step * kMmaDepth, lane));
      ptx::store_matrix_x4(at(step), a);
    }
  }
  ptx::fence_async_shared();
}

// What a kernel's pass over x is made of. kDown: with a down projection of kRank ranks.
template <int kRank_, int kSubs_, int kSubRows_, bool kDown_, bool kDropout_>
struct PassForm {
  static constexpr int kRank = kRank_;
  static constexpr int kSubs = kSubs_, kSubRows = kSubRows_;   // stages of a chunk, how far apart
  static constexpr bool kDown = kDown_, kDropout = kDropout_;  // kDropout: x may be masked
  // Whether h and down come with their ranks as rows: nobody has shown yet that wgmma takes part of
  // a panel of 64.
  static constexpr bool kTurned = kRank < 64;
  static constexpr uint32_t kStageOfH = 2 * kRowBytes * (kTurned ? kRank : 64);  // bytes
  // Beside 128 sums of the down projection there is no room for as many of the gradient.
  static constexpr int kGradRank = kRank < 128 ? kRank : 128;
  // One turn at a stage leaves its gradient in registers when the stage is released.
  static constexpr bool kStoresLate = kRank == kGradRank;
  static constexpr int kSums = kDown ? kSubs : 1, kSumCount = kDown ? kRank / 2 : 1;
  static_assert(kRank == kGradRank || kSubs == 1, "a second turn at a stage needs all its rows");
  static_assert(!(kDown && kDropout), "dy, which has a down projection, is never masked");
};

// A warpgroup's view of it.
struct PassPlace {
  uint32_t h, h_panel, ones;  // in shared memory: a chunk of h, bytes from 64 ranks to the next
  bool with_grad, with_sums;
  LaneDropout dropout;  // of the lane's first row
  uint32_t group, warp, lane;
};

// The stages of the 64 columns of x from `column` on, kSubs times 128 rows, by both warpgroups.
// Sums of the down projection go on; the gradient is complete: the warpgroup whose columns these
// are gives it away by store(grad, first rank), and sums of columns by store_sums(sums).
template <class T, class Form, class Ring, class Store, class StoreSums>
__device__ __forceinline__ void pass_columns(float (&sum)[Form::kSums][Form::kSumCount], Ring& ring,
                                             const PassPlace& at, uint32_t column, bool mine,
                                             bool accumulate, const Store& store,
                                             const StoreSums& store_sums) {
  constexpr uint32_t kRowsBytes = 64 * kRowBytes;
  float grad[Form::kGradRank / 2], ones[8];
  LK_UNROLL
  for (int sub = 0; sub < Form::kSubs; ++sub) {
    const uint32_t own = ring.a() + at.group * kRowsBytes;
    ring.wait();
    if (Form::kDropout && at.dropout.on) {
      mask_rows(own, below(at.dropout, sub * Form::kSubRows), column, at.warp, at.lane);
      ptx::named_barrier_sync<4>(256);
    }
    if constexpr (Form::kDown) {
      multiply_rows<T, Form::kTurned>(sum[sub], own, ring.b(), accumulate);
      ptx::wgmma_wait<0>();
      ptx::wgmma_keep(sum[sub]);
    }
    if (mine && at.with_sums) {
      multiply_ones<T>(ones, ring.a(), at.ones, sub > 0);
      ptx::wgmma_wait<0>();
      ptx::wgmma_keep(ones);
    }
    if (mine && at.with_grad) {
      LK_UNROLL
      for (uint32_t rank = 0; rank < Form::kRank; rank += Form::kGradRank) {
        multiply_columns<T, Form::kTurned>(grad, ring.a(),
                                           at.h + rank / 64 * at.h_panel + sub * Form::kStageOfH,
                                           at.h_panel, sub > 0);
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(grad);
        if (!Form::kStoresLate && sub + 1 == Form::kSubs) store(grad, rank);
      }
    }
    ring.advance();
    ring.release_previous(at.lane);
  }
  // The stages are free: what is stored now holds up no load.
  if (Form::kStoresLate && mine && at.with_grad) store(grad, 0);
  if (mine && at.with_sums) store_sums(ones);
}

}  // namespace lora_kernels

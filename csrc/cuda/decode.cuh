// y [M, N] and h [M, r] of up to 64 rows of x in one launch, by cp.async and mma.sync.
//
//   h = scale * dropout(x) A^T      y = x W^T + up_scale * h B^T + bias
//
// W is the traffic, and takes the side of mma that has 16 rows: a block multiplies all of A, and
// below it tile_n rows of W, by x^T, so that the sums of h come out of the same pipeline as those
// of y. Every block makes the h that it needs itself: nothing is exchanged but within a cluster,
// whose blocks split K (sm_90 alone) and add their sums in the order of their parts. Nothing
// depends on timing.
//
// The ring is entered at such a slot that what follows the last stage, B and the bias, comes to lie
// in its last place: the sums then take the others.
#pragma once
#include "decode_end.cuh"
#include "dropout.cuh"

namespace lora_kernels {

// Where a chunk of a row of a stage lies: swizzled, so that 8 rows meet 8 bank groups.
__device__ __forceinline__ uint32_t stage_offset(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// The chunks of A and, below it, of W that a thread copies, stage after stage.
template <class Tile>
struct StackedRows {
  static constexpr int kChunks = kRowElements / 8, kRowStep = Tile::kThreads / kChunks;
  static constexpr int kCount = Tile::kRows / kRowStep;
  const uint16_t* from[kCount];  // nullptr: there is no such row, but zeros
  const uint16_t* anywhere;      // what a copy of nothing names

  __device__ __forceinline__ StackedRows(const ForwardArgs& args, const DecodeWork& work,
                                         const DecodePlace& place, uint32_t thread) {
    const Matrix &a = args.down.down, &w = args.gemm.weight;
    const auto *ranks = static_cast<const uint16_t*>(a.data),
               *columns = static_cast<const uint16_t*>(w.data);
    anywhere = args.gemm.N > 0 ? columns : ranks;
    LK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int row = static_cast<int>(thread / kChunks) + i * kRowStep;
      const int64_t n = place.column + row - work.ranks;
      const uint16_t* first = nullptr;
      if (row < work.ranks)
        first = row < args.down.r ? ranks + row * a.row_stride : nullptr;
      else if (n < place.end)
        first = columns + n * w.row_stride;
      from[i] = first == nullptr ? nullptr : first + thread % kChunks * 8;
    }
  }
  __device__ __forceinline__ void load(uint32_t stage, int64_t k, int64_t K,
                                       uint32_t thread) const {
    const int64_t left = K - k - thread % kChunks * 8;
    const uint32_t bytes = left < 0 ? 0 : left > 8 ? kChunkBytes : static_cast<uint32_t>(left) * 2;
    LK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const bool exists = from[i] != nullptr && bytes > 0;
      ptx::cp_async_16(stage + stage_offset(thread / kChunks + i * kRowStep, thread % kChunks),
                       exists ? from[i] + k : anywhere, exists ? bytes : 0);
    }
  }
};

// sum += one stage, as far as this warp's slice of the depth goes. The first `masked` of its units
// are rows of A, which meet dropout(x).
template <class Tile, class T>
__device__ __forceinline__ void multiply_stage(float (&sum)[Tile::kUnits][Tile::kBlocks][4],
                                               uint32_t stage, const LaneDropout& dropout,
                                               int masked, uint32_t k, uint32_t warp_n,
                                               uint32_t warp_k, uint32_t lane) {
  constexpr uint32_t kPieces = Tile::kM / kUnit;
  static_assert(Tile::kSteps <= 4, "a word holds the bits of four fragments");
  uint32_t kept[kPieces];
  LK_UNROLL
  for (uint32_t p = 0; p < kPieces; ++p)
    kept[p] = draw_straddling(below(dropout, p * kUnit), k + warp_k * kMmaDepth,
                              Tile::kWarpsK * kMmaDepth, Tile::kSteps, lane);
  LK_UNROLL
  for (uint32_t i = 0; i < Tile::kSteps; ++i) {
    const uint32_t step = i * Tile::kWarpsK + warp_k, chunk = step * 2 + lane / 16;
    uint32_t x[kPieces][4], dropped[kPieces][4];
    LK_UNROLL
    for (uint32_t p = 0; p < kPieces; ++p) {
      ptx::load_matrix_x4(x[p],
                          stage + Tile::kStackBytes + stage_offset(p * kUnit + lane % 16, chunk));
      LK_UNROLL
      for (int v = 0; v < 4; ++v) dropped[p][v] = x[p][v];
      if (dropout.on)
        apply_dropout(dropped[p], below(dropout, p * kUnit), k + step * kMmaDepth,
                      kept[p] >> 8 * i);
    }
    LK_UNROLL
    for (int u = 0; u < Tile::kUnits; ++u) {
      uint32_t w[4];
      ptx::load_matrix_x4(
          w, stage + stage_offset((warp_n * Tile::kUnits + u) * kUnit + lane % 16, chunk));
      const bool is_a = u < masked;
      LK_UNROLL
      for (uint32_t p = 0; p < kPieces; ++p) {
        // As the operand of 16 columns registers 0 and 2 are its first 8, 1 and 3 the others.
        uint32_t b[4];
        LK_UNROLL
        for (int v = 0; v < 4; ++v) b[v] = is_a ? dropped[p][v] : x[p][v];
        ptx::mma_m16n8k16(sum[u][2 * p], w, b[0], b[2], T{});
        ptx::mma_m16n8k16(sum[u][2 * p + 1], w, b[1], b[3], T{});
      }
    }
  }
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    decode_kernel(const ForwardArgs args, const DecodeWork work) {
  const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;
  const DecodeEnd<Tile> end{ptx::shared_base()};
  const int64_t K = args.down.K, column = int64_t{blockIdx.x / work.splits} * work.tile_n;
  const int64_t past = column + work.tile_n < args.gemm.N ? column + work.tile_n : args.gemm.N;
  const DecodePlace place{column, past, blockIdx.x % work.splits};
  const int64_t first = place.rank * work.stages * kRowElements;

  const Matrix& m = args.down.x;
  const TileSource x{static_cast<const uint16_t*>(m.data),
                     m.row_stride,
                     m.col_stride,
                     args.down.M,
                     K,
                     work.x_vectors};
  const StackedRows<Tile> rows(args, work, place, thread);
  const int masked =
      work.ranks / kUnit - static_cast<int>(warp_n) * Tile::kUnits;  // of the warp's units
  LaneDropout dropout = load_dropout(args.down.dropout, 0, lane);
  dropout.on = dropout.on && masked > 0;
  const auto load = [&](uint32_t slot, int64_t stage) {
    const uint32_t at = end.shared + slot * Tile::kStageBytes;
    const int64_t k = first + stage * kRowElements;
    if (stage == work.stages) load_up<Tile, T>(args.gemm, work, place, end, thread);
    if (stage >= work.stages || k >= K) return;
    rows.load(at, k, K, thread);
    load_tile<Tile::kM, StackedRows<Tile>::kChunks, Tile::kThreads>(
        x, 0, k, thread, [&](uint32_t row, uint32_t chunk) {
          return at + Tile::kStackBytes + stage_offset(row, chunk);
        });
  };
  float sum[Tile::kUnits][Tile::kBlocks][4] = {};

  // The first turns fill the ring. One commit a turn, empty or not, so that group s is always
  // stage s.
  uint32_t slot = Tile::kStages - 1 - static_cast<uint32_t>(work.stages % Tile::kStages);
  uint32_t next_slot = slot;
  const auto advance = [](uint32_t& s) { s = s + 1 == Tile::kStages ? 0 : s + 1; };
#pragma unroll 1
  for (int64_t s = 1 - Tile::kStages; s < work.stages; ++s) {
    if (s >= 0) {
      // This stage is here, and every warp is done with the one before, whose place the next takes.
      ptx::cp_async_wait<Tile::kStages - 2>();
      ptx::block_sync();
    }
    load(next_slot, s + Tile::kStages - 1);
    ptx::cp_async_commit();
    advance(next_slot);
    const int64_t k = first + s * kRowElements;
    if (s < 0 || k >= K) continue;
    multiply_stage<Tile, T>(sum, end.shared + slot * Tile::kStageBytes, dropout, masked,
                            static_cast<uint32_t>(k), warp_n, warp_k, lane);
    advance(slot);
  }
  ptx::cp_async_wait<0>();
  ptx::block_sync();  // the stages are free, and B is here

  add_warps<Tile>(sum, end, warp_n, warp_k, lane);
  const bool clustered = work.splits > 1;
  if (clustered) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  make_h<Tile, T>(args.down, work, place, end, warp, lane);
  if (clustered) gather_share<Tile>(work, place, end, warp, lane);
  ptx::block_sync();  // h is there
  if (clustered) ptx::cluster_arrive();
  make_y<Tile, T>(args.gemm, work, place, end, warp, lane);
  ptx::warp_sync();
  if (clustered) ptx::cluster_wait();  // no block leaves while others read its sums
}

// Calls launch(kernel) with the instance that serves the plan; false if none was built.
template <class T, class Launch>
bool with_decode(const DecodePlan& plan, const Launch& launch) {
  return with_decode_tile(plan, [&](auto tile) { launch(decode_kernel<decltype(tile), T>); });
}

}  // namespace lora_kernels

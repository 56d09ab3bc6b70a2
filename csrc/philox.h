// The dropout mask in C++ and CUDA. lora_kernels/dropout.py holds the specification.
//
// One Philox4x32-7 call serves the 8 elements that one lane owns of a 16x16 tensor-core fragment:
// rows {g, g+8} by columns {2t, 2t+1, 2t+8, 2t+9}. Word v of the result belongs to register v of an
// mma A fragment (and to the accumulators of two n8 blocks), its low half to the even column. So a
// kernel of any tile shape draws the mask from the registers it already holds.
#pragma once
#include <cstdint>

#include "lora.h"

#if defined(__CUDACC__)
#define LK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LK_HOST_DEVICE static inline
#endif

namespace lora_kernels {

constexpr int kPhiloxRounds = 7;        // the fewest that pass BigCrush (Salmon et al., SC 2011)
constexpr uint32_t kMaskBits = 0x3fff;  // 14 bits: as fp16 bit patterns they are finite and ordered
constexpr uint32_t kMaskRange = 1u << 14;  // so HSET2 compares two elements at once

struct PhiloxWords {
  uint32_t v[4];
};

template <int kRounds = kPhiloxRounds>
LK_HOST_DEVICE PhiloxWords philox(uint32_t column_group, uint32_t row_group, uint64_t offset,
                                  uint64_t seed) {
  uint32_t c0 = column_group, c1 = row_group;
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  LK_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

LK_HOST_DEVICE uint32_t row_group(int64_t row) {
  return static_cast<uint32_t>((row / 16) * 8 + row % 8);
}
LK_HOST_DEVICE uint32_t column_group(int64_t col) {
  return static_cast<uint32_t>((col / 16) * 4 + col % 8 / 2);
}
// The place of this shard in the global matrix that the mask is defined over.
LK_HOST_DEVICE int64_t row0(const Dropout& d) { return d.seed_len == 4 ? d.seed[2] : 0; }
LK_HOST_DEVICE int64_t col0(const Dropout& d) { return d.seed_len == 4 ? d.seed[3] : 0; }

}  // namespace lora_kernels

// How tiles lie in shared memory: 16-bit elements, 128-byte swizzle everywhere.
//
// A K-major tile has rows of 64 elements along K; an MN-major tile consists of panels of 64
// elements along M or N, one row for each k. Either way a row is 128 bytes, 8 rows are one swizzle
// atom of 1024 bytes, and within an atom the hardware exchanges 16-byte chunk c of row i with chunk
// c ^ i.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LK_SHARED_FUNCTION __host__ __device__ constexpr
#else
#define LK_SHARED_FUNCTION constexpr
#endif

namespace lora_kernels {

constexpr uint32_t kRowBytes = 128;    // one row of a tile: the swizzle's width
constexpr uint32_t kRowElements = 64;  // of 16 bits
constexpr uint32_t kAtomBytes = 1024;  // 8 rows; every tile starts at a multiple of it
constexpr uint32_t kChunkBytes = 16;   // what the swizzle moves as one
constexpr uint32_t kMmaDepth = 16;     // K of one wgmma or mma.sync
constexpr uint64_t kSwizzle128 = 1ull << 62;

// Where byte `offset` of a tile lies in it.
LK_SHARED_FUNCTION uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// The operand of a wgmma, PTX ISA "matrix descriptor": address bits 0-13, leading byte offset
// 16-29, stride byte offset 32-45, all in units of 16 bytes; the swizzle in bits 62-63.
LK_SHARED_FUNCTION uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128;
}
// K-major: atoms of 8 rows follow one another; the leading offset is not used.
LK_SHARED_FUNCTION uint64_t k_major_descriptor(uint32_t address) {
  return matrix_descriptor(address, kChunkBytes, kAtomBytes);
}
// MN-major: panels of 64 elements are panel_bytes apart, atoms of 8 k-rows follow one another.
LK_SHARED_FUNCTION uint64_t mn_major_descriptor(uint32_t address, uint32_t panel_bytes) {
  return matrix_descriptor(address, panel_bytes, kAtomBytes);
}
// The operand so many bytes further on: an addition to its low word, since addresses end below the
// field's end. The high word stays a constant that the compiler knows.
LK_SHARED_FUNCTION uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}
// Bytes from one k16 step of a tile to the next.
constexpr uint32_t kKMajorStep = kMmaDepth * 2;
constexpr uint32_t kMnMajorStep = kMmaDepth * kRowBytes;

}  // namespace lora_kernels

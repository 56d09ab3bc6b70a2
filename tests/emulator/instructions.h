// Single instructions on plain numbers, for comparison with what others say of them.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "machine.h"

namespace emu {

// One operand of a wgmma of depth 64: how its tile gets into shared memory and is described.
struct OperandSpec {
  const uint16_t* data;  // [outer, inner]
  int64_t outer, inner;
  int box_inner, box_outer;
  std::vector<std::array<int, 3>> copies;  // byte of the tile, inner and outer coordinate
  uint64_t descriptor;                     // without its address
  std::vector<uint32_t> starts;            // byte of the tile, of each k16 step
  bool transposed;
};

// Registers [128 threads, n / 2] of d = sum over the steps of a * b. If a_registers is not empty,
// [steps, 128 threads, 4 registers], a comes from there.
std::vector<float> run_wgmma(const OperandSpec& a, const OperandSpec& b, int n, bool is_bf16,
                             const std::vector<uint32_t>& a_registers, Options options);

// [32 lanes, 4 registers] of ldmatrix.x4 from four 8x8 matrices, lane l addressing row l.
std::vector<uint32_t> run_ldmatrix(const std::vector<uint16_t>& matrices, bool transposed);
// The four matrices that stmatrix.x4 writes of such registers.
std::vector<uint16_t> run_stmatrix(const std::vector<uint32_t>& registers);
// Registers [32 lanes] of movmatrix from such of an 8x8 matrix.
std::vector<uint32_t> run_movmatrix(const std::vector<uint32_t>& registers);
// [32 lanes, 4] of d = a * b of mma.m16n8k16, registers [32, 4] and [32, 2].
std::vector<float> run_mma(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b,
                           bool is_bf16);

}  // namespace emu

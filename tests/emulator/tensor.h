// Matrix fragments and tensor cores, by the layouts of the PTX ISA.
#pragma once
#include "memory.h"
#include "numbers.h"

namespace emu {

// A wgmma as one warp sees it: 16 of its 64 rows.
struct WgmmaOp {
  uint64_t a = 0, b = 0;                        // descriptors
  std::array<const uint32_t*, 32> registers{};  // of a, if it is in registers
  std::array<float*, 32> d{};
  bool a_in_registers = false, transposed_a = false, transposed_b = false, is_bf16 = false;
  bool accumulate = true;
  int columns = 0;
  uint32_t group = 0;
  std::shared_ptr<Knowledge> known;
  Place place;
  bool done = false;
  std::vector<float> product;  // [16, columns]
};

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, Place at);
void store_matrices(uint32_t address, const uint32_t (&r)[4], Place at);
uint32_t turn_matrix(uint32_t matrix, Place at);
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16,
              Place at);
bool elect(Place at);
uint32_t shuffle_from_0(uint32_t value, Place at);
void sync_warp(Place at);

void fence_wgmma(Place at);
// `a` is null where both operands have descriptors.
void issue_wgmma(float* d, int count, const uint32_t* a, uint64_t a_descriptor, uint64_t b,
                 bool transposed_a, bool transposed_b, bool accumulate, bool is_bf16, Place at);
void commit_wgmmas(Place at);
void wait_wgmmas(uint32_t pending, Place at);

}  // namespace emu

// The source of the CUDA mask kernel, run on the host: threads one after another, in any order,
// which is what they are since no thread reads what another wrote.
#include <ATen/core/PhiloxRNGEngine.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#define __global__
#define __launch_bounds__(n)
struct Dim {
  unsigned x;
};
static Dim blockIdx, threadIdx, gridDim;

#include "../csrc/cuda/dropout_mask.cuh"

namespace py = pybind11;

// The mask [rows, cols] by a grid of `blocks` blocks; guard bytes around it must stay untouched.
py::array_t<uint8_t> dropout_mask(std::vector<int64_t> seed, int64_t rows, int64_t cols,
                                  uint32_t threshold, unsigned blocks) {
  constexpr int64_t kGuard = 64;
  constexpr uint8_t kUntouched = 0xA5;
  std::vector<uint8_t> memory(rows * cols + 2 * kGuard, kUntouched);
  lora_kernels::DropoutMaskArgs args{reinterpret_cast<bool*>(memory.data() + kGuard),
                                     rows,
                                     cols,
                                     {seed.data(), static_cast<int>(seed.size()), threshold}};
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < lora_kernels::kMaskThreads; ++threadIdx.x)
      lora_kernels::dropout_mask_kernel(args);
  for (int64_t i = 0; i < kGuard; ++i)
    if (memory[i] != kUntouched || memory[memory.size() - 1 - i] != kUntouched)
      throw std::runtime_error("the kernel wrote outside the mask");
  py::array_t<uint8_t> result({rows, cols});
  std::memcpy(result.mutable_data(), memory.data() + kGuard, rows * cols);
  return result;
}

// Philox4x32-7 of one counter and key.
std::vector<uint32_t> philox(uint32_t c0, uint32_t c1, uint64_t offset, uint64_t seed) {
  const auto words = lora_kernels::philox(c0, c1, offset, seed);
  return {words.v[0], words.v[1], words.v[2], words.v[3]};
}

// Philox4x32-10 of a counter: ours, and torch's own generator.
using Words = std::vector<uint32_t>;
std::pair<Words, Words> philox10(uint64_t low, uint64_t high, uint64_t seed) {
  const auto words = lora_kernels::philox<10>(static_cast<uint32_t>(low),
                                              static_cast<uint32_t>(low >> 32), high, seed);
  at::Philox4_32 engine(seed, high, low);
  Words theirs(4);
  for (uint32_t& word : theirs) word = engine();
  return {{words.v, words.v + 4}, theirs};
}

PYBIND11_MODULE(mask_module, m) {
  m.def("dropout_mask", &dropout_mask);
  m.def("philox", &philox);
  m.def("philox10", &philox10);
}

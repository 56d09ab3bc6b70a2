// What tests/test_gates.py holds the machine's speed against: always compiled, never changed.
#include <cstdint>

namespace yardstick {

__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, "
      "{%5, %5}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a), "r"(b));
}

template <int kRows, int kSteps>
__global__ void work(float* out, const uint32_t* in, int count) {
  float sum[kRows][4] = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a = in[i * kSteps + step], b = a;
#pragma unroll
      for (int round = 0; round < 7; ++round) {
        a = __umulhi(a, 0xD2511F53u) ^ b;
        b = a * 0xCD9E8D57u + round;
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) multiply(sum[row], a + row, b ^ row);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      out[(row * 4 + e) * blockDim.x + threadIdx.x] = sum[row][e] * static_cast<float>(e + 1);
  }
}

template __global__ void work<16, 4>(float*, const uint32_t*, int);
template __global__ void work<16, 8>(float*, const uint32_t*, int);
template __global__ void work<32, 4>(float*, const uint32_t*, int);
template __global__ void work<32, 8>(float*, const uint32_t*, int);
template __global__ void work<48, 4>(float*, const uint32_t*, int);
template __global__ void work<48, 8>(float*, const uint32_t*, int);

}  // namespace yardstick

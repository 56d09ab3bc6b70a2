// Kernels with one flaw each, for tests/test_gates.py: compiled for sm_90a, never launched.
#include <cstdint>
#include <cstdio>

namespace flawed {

__device__ __forceinline__ void multiply(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
}

enum Flaw { kNone, kPrints, kReleases };

template <Flaw flaw>
__global__ void __launch_bounds__(128)
    gemm(float* out, uint64_t a, uint64_t b, int blocks, uint32_t slot) {
  float d[4] = {};
  for (int i = 0; i < blocks; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 4; ++k) multiply(d, a + i + 2 * k, b + i + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if constexpr (flaw == kReleases) {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(slot)
                   : "memory");
    } else {
      asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(slot) : "memory");
    }
  }
  if constexpr (flaw == kPrints) printf("%f\n", d[0]);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
template __global__ void gemm<kNone>(float*, uint64_t, uint64_t, int, uint32_t);
template __global__ void gemm<kPrints>(float*, uint64_t, uint64_t, int, uint32_t);
template __global__ void gemm<kReleases>(float*, uint64_t, uint64_t, int, uint32_t);

// 2048 threads a multiprocessor leave 32 registers for 64 values.
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[63 - i] * v[i] + v[i * 7 % 64];
}

}  // namespace flawed

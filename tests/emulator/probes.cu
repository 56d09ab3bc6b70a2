// The probes on a real device, as plain C functions: tests/test_emulator_probes.py compiles and
// calls them. What comes back is a cudaError_t.
#include <cuda_runtime_api.h>

#include "cuda/encode_tensor_map.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "probes.cuh"

namespace {

using namespace lora_kernels;
using ptx::bf16;

// [mn, K], or [K, mn] if transposed, which is loaded in panels of 64.
TensorMapSpec operand(const void* data, int mn, int K, bool transposed, int box_rows) {
  if (transposed) return {data, mn, K, mn, 64, Dtype::bf16};
  return {data, K, mn, K, box_rows, Dtype::bf16};
}

template <class P>
cudaError_t run_gemm(const void* a, const void* b, void* c, int M, int N, int K) {
  const TensorMapSpec specs[] = {operand(a, M, K, P::kTransA, P::kM),
                                 operand(b, N, K, P::kTransB, P::kN / 2),
                                 {c, N, M, N, 64, Dtype::bf16}};
  CUtensorMap maps[3];
  for (int i = 0; i < 3; ++i)
    if (const cudaError_t error = encode_tensor_map(specs[i], &maps[i])) return error;
  const auto kernel = gemm_probe<P>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
  if (error != cudaSuccess) return error;
  constexpr int kClusters = 8;  // fewer than tiles: each takes several
  kernel<<<2 * kClusters, P::kThreads, P::kSharedBytes>>>(maps[0], maps[1], maps[2],
                                                          GemmProbeArgs{M, N, K});
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  return cudaDeviceSynchronize();
}

template <int kN>
cudaError_t run_gemm_of(const void* a, const void* b, void* c, int M, int N, int K, bool trans_a,
                        bool trans_b) {
  if (trans_a && trans_b) return run_gemm<GemmProbe<bf16, kN, 1, 1>>(a, b, c, M, N, K);
  if (trans_a) return run_gemm<GemmProbe<bf16, kN, 1, 0>>(a, b, c, M, N, K);
  if (trans_b) return run_gemm<GemmProbe<bf16, kN, 0, 1>>(a, b, c, M, N, K);
  return run_gemm<GemmProbe<bf16, kN, 0, 0>>(a, b, c, M, N, K);
}

}  // namespace

// Exported whatever the library's flags say.
#define LK_EXPORT extern "C" __attribute__((visibility("default")))

LK_EXPORT int probe_gemm(const void* a, const void* b, void* c, int M, int N, int K, int tile_n,
                         int trans_a, int trans_b) {
  return tile_n == 256 ? run_gemm_of<256>(a, b, c, M, N, K, trans_a, trans_b)
                       : run_gemm_of<128>(a, b, c, M, N, K, trans_a, trans_b);
}

// words: the ticket and the flags, zero.
LK_EXPORT int probe_relay(const void* in, void* h, void* out, uint32_t* words, int tiles,
                          int blocks) {
  CUtensorMap h_map, out_map;
  cudaError_t error = encode_tensor_map({h, 64, 64 * tiles, 64, 64, Dtype::bf16}, &h_map);
  if (error == cudaSuccess)
    error = encode_tensor_map({out, 64, 64 * tiles, 64, 64, Dtype::bf16}, &out_map);
  if (error != cudaSuccess) return error;
  const RelayProbeArgs args{static_cast<const uint16_t*>(in), static_cast<uint16_t*>(h), words,
                            words + 1, tiles};
  relay_probe<<<blocks, 128, kRelayTile + 1024 + 64>>>(h_map, out_map, args);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  return cudaDeviceSynchronize();
}
#endif

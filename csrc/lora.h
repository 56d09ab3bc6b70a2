// The arguments of every kernel, shared by csrc/cuda and csrc/cpu. No torch header here.
//
//   forward    h  = down_proj(x, A)            y  = fused_gemm(x, W0, h, B) + bias
//   backward   dh = down_proj(dy, B^T)         dx = fused_gemm(dy, W0^T, dh, A^T)
//              dA = weight_grad(dh, x)         dB = weight_grad(h, dy)^T
//
// A matrix is a pointer with two strides in elements, so views cost nothing. Accumulation is fp32.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define LK_UNROLL _Pragma("unroll")
#else
#define LK_UNROLL _Pragma("GCC unroll 8")
#endif

namespace lora_kernels {

// Projections that share x and go through one launch: q, k, v, gate and up of a parallel block.
constexpr int kMaxGroup = 5;

enum class Dtype { f32, bf16, f16 };

struct Matrix {
  void* data;
  int64_t row_stride;
  int64_t col_stride;
  Dtype dtype;
};

// Which elements survive: lora_kernels/dropout.py specifies the mask, philox.h draws it.
struct Dropout {
  const int64_t* seed;  // {seed, offset} or {seed, offset, row0, col0}; nullptr keeps everything
  int seed_len;         // 2 or 4
  uint32_t threshold;   // 0..16384: an element is dropped iff its 14 bits are below
};

struct DropoutMaskArgs {
  bool* mask;  // [rows, cols], contiguous
  int64_t rows, cols;
  Dropout dropout;
};

// h [M, r] = scale * select(mask, x, 0) * down^T
struct DownProjArgs {
  Matrix x;     // [M, K]
  Matrix down;  // [r, K]
  Matrix h;     // [M, r]
  int64_t M, K, r;
  float scale;
  Dropout dropout;
};

// y [M, N] = x * weight^T + select(mask, scale * h * up^T, 0) + bias
struct FusedGemmArgs {
  Matrix x;       // [M, K]
  Matrix weight;  // [N, K]
  Matrix h;       // [M, r]
  Matrix up;      // [N, r]
  Matrix bias;    // [1, N], data may be null
  Matrix y;       // [M, N]
  int64_t M, N, K, r;
  float scale;
  Dropout dropout;
};

// A forward call: y and the h between.
struct ForwardArgs {
  DownProjArgs down;   // x, A, h, which is contiguous
  FusedGemmArgs gemm;  // x, W0, h, B, bias, y
};

// grad [r, K] = scale * h^T * select(mask, x, 0)
struct WeightGradArgs {
  Matrix h;     // [M, r]
  Matrix x;     // [M, K]
  Matrix grad;  // [r, K]
  int64_t M, K, r;
  float scale;
  Dropout dropout;
};

}  // namespace lora_kernels

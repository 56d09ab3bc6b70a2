// What the sources of the sm_90a kernels share.
#pragma once
#include "cuda/descriptor.h"
#include "cuda/tensor_map.h"
#include "numbers.h"
#include "tensor.h"

namespace emu {

inline TensorMap encode(const lora_kernels::TensorMapSpec& s) {
  return make_tensor_map({s.data, s.columns, s.rows, s.row_stride,
                          static_cast<int>(lora_kernels::kRowElements), s.box_rows});
}

// Calls f(Bf16{}) or f(F16{}).
template <class F>
void with_type(lora_kernels::Dtype dtype, const F& f) {
  if (dtype == lora_kernels::Dtype::bf16)
    f(Bf16{});
  else
    f(F16{});
}

}  // namespace emu

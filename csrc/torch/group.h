// What the ops of groups share on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace lora_kernels {

// The number of projections: every list has one entry for each.
template <class... Lists>
size_t group_size(const char* op, const Lists&... lists) {
  const size_t sizes[] = {lists.size()...};
  for (size_t size : sizes)
    STD_TORCH_CHECK(size == sizes[0] && size > 0, op,
                    ": every list must have one entry a projection, but they have ", sizes[0],
                    " and ", size);
  return sizes[0];
}

}  // namespace lora_kernels

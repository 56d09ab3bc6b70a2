#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "fused_gemm_work.h"
#include "tensor_map.h"

namespace lora_kernels {

// By cuTensorMapEncodeTiled, which is looked up at run time: the library does not link libcuda.
cudaError_t encode_tensor_map(const TensorMapSpec& spec, CUtensorMap* map);

struct EncodedFusedGemmMaps {
  CUtensorMap x, weight, h, up, y;
};
cudaError_t encode_fused_gemm_maps(const FusedGemmMaps& specs, EncodedFusedGemmMaps* maps);

}  // namespace lora_kernels

#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "fused_gemm_work.h"
#include "tensor_map.h"

namespace lora_kernels {

// By cuTensorMapEncodeTiled, which is looked up at run time: the library does not link libcuda.
cudaError_t encode_tensor_map(const TensorMapSpec& spec, CUtensorMap* map);

using EncodedFusedGemmMaps = GemmMaps<CUtensorMap>;
cudaError_t encode_fused_gemm_maps(const FusedGemmMaps& specs, EncodedFusedGemmMaps* maps);
// `count` of them.

cudaError_t encode_fused_gemm_maps(const GemmGroupMaps<TensorMapSpec>& specs, int count,
                                   GemmGroupMaps<CUtensorMap>* maps);

}  // namespace lora_kernels

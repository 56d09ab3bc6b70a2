#include "encode_tensor_map.h"

#include <cudaTypedefs.h>

#include "descriptor.h"

namespace lora_kernels {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();  // not to be found by the next launch
    return nullptr;
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

cudaError_t encode_tensor_map(const TensorMapSpec& spec, CUtensorMap* map) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;  // a driver older than CUDA 12.0
  const auto type = spec.dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(spec.columns),
                              static_cast<cuuint64_t>(spec.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(spec.row_stride) * 2};
  const cuuint32_t box[] = {kRowElements, static_cast<cuuint32_t>(spec.box_rows)}, ones[] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(spec.data), sizes, strides, box, ones,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t encode_fused_gemm_maps(const FusedGemmMaps& specs, EncodedFusedGemmMaps* maps) {
  cudaError_t error = encode_tensor_map(specs.x, &maps->x);
  if (error == cudaSuccess) error = encode_tensor_map(specs.weight, &maps->weight);
  if (error == cudaSuccess) error = encode_tensor_map(specs.h, &maps->h);
  if (error == cudaSuccess) error = encode_tensor_map(specs.up, &maps->up);
  if (error == cudaSuccess) error = encode_tensor_map(specs.y, &maps->y);
  return error;
}

cudaError_t encode_fused_gemm_maps(const GemmGroupMaps<TensorMapSpec>& specs, int count,
                                   GemmGroupMaps<CUtensorMap>* maps) {
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < count && error == cudaSuccess; ++i)
    error = encode_fused_gemm_maps(specs.each[i], &maps->each[i]);
  return error;
}

}  // namespace lora_kernels

// What every CUDA op does around its launches.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/fused_gemm_plan.h"
#include "../cuda/launch.h"
#include "aten.h"
#include "convert.h"
#include "stream.h"

namespace lora_kernels {

// Makes the tensor's device current, for torch and for the runtime that this library links itself.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    const cudaError_t error = cudaSetDevice(t.get_device_index());
    STD_TORCH_CHECK(error == cudaSuccess, "lora_kernels: device ", t.get_device_index(), ": ",
                    cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(cudaError_t error, const char* kernel, int64_t rows, int64_t cols) {
  if (error != cudaSuccess) cudaGetLastError();  // not to be found by the next launch
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " [", rows, ", ", cols,
                  "]: ", cudaGetErrorString(error));
}

inline void check_cuda_operand(const Operand& o, const Tensor& like, Dtype dtype, const char* op,
                               const char* name) {
  STD_TORCH_CHECK(o.matrix.dtype != Dtype::f32, op, ": ", name,
                  " must be bfloat16 or float16 on a CUDA device; for float32 take "
                  "backend='composed'");
  STD_TORCH_CHECK(o.matrix.dtype == dtype, op, ": ", name, " has dtype ", name_of(o.matrix.dtype),
                  " but must have that of x, ", name_of(dtype));
  STD_TORCH_CHECK(o.tensor.device() == like.device(), op, ": ", name, " is on device ",
                  o.tensor.get_device_index(), " but must be on that of x, ",
                  like.get_device_index());
}

inline void check_seed_device(const OptionalTensor& seed, const Tensor& x, const char* op) {
  if (!seed.has_value()) return;
  STD_TORCH_CHECK(seed->device() == x.device(), op, ": seed is on device ",
                  seed->get_device_index(), " but must be on that of x, ", x.get_device_index());
}

// The device that a tensor's kernels run on, which is current.
inline Target target_of(const Tensor& x) {
  Target target;
  const cudaError_t error = device_target(x.get_device_index(), &target);
  STD_TORCH_CHECK(error == cudaSuccess, "lora_kernels: attributes of device ", x.get_device_index(),
                  ": ", cudaGetErrorString(error));
  return target;
}

// And for a form that a caller asks for: "sm80" is the kernels of sm_80, on any device.
inline Target target_of(const Tensor& x, const std::string& form) {
  Target target = target_of(x);
  if (form == "sm80") target.compute = 80;
  return target;
}

// Memory for the length of a call; the stream's order keeps it from being used again too early.
class Workspace {
 public:
  Workspace(int64_t bytes, const Tensor& like) {
    if (bytes > 0)
      memory_ = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, like.device());
  }
  void* data() const { return memory_.has_value() ? memory_->mutable_data_ptr() : nullptr; }

 private:
  OptionalTensor memory_;
};

// What a caller asks of the tiles of fused_gemm; 0: the best.
inline FusedGemmRequest gemm_request_of(int64_t tile_n, int64_t group, const char* op) {
  const bool has_tile =
      tile_n == 0 ||
      (tile_n > 0 && tile_n <= 256 && with_fused_gemm_tile(static_cast<int>(tile_n), [](auto) {}));
  STD_TORCH_CHECK(has_tile, op, ": tile_n is ", tile_n,
                  "; expected 128, 192, 256, or 0 for the best");
  STD_TORCH_CHECK(group >= 0 && group < kTmaLimit, op, ": group is ", group,
                  "; expected a number of pairs of row blocks, or 0 for the best");
  return {static_cast<int>(tile_n), static_cast<int>(group)};
}

// A tensor of x's kind on its device, uninitialised.
inline Tensor empty_like(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, x.device());
}
inline Tensor empty_like(const Tensor& x, const std::vector<int64_t>& sizes) {
  return empty_like(x, sizes, x.scalar_type());
}

}  // namespace lora_kernels

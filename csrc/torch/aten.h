// ATen through the C shim: the stable ABI's shortest way, for calls on the host's critical path.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous CPU tensor, uninitialised.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  constexpr int64_t kMaxDim = 64;
  STD_TORCH_CHECK(dim <= kMaxDim, "lora_kernels: at most ", kMaxDim, " dimensions");
  int64_t strides[kMaxDim], stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// The memory of t, from its first element plus `offset` elements on, as a [rows, cols] matrix.
inline Tensor view_2d(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride,
                      int64_t col_stride, int64_t offset = 0) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

// The vendor's GEMM into memory that exists: out = a * b.
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = beta * c + alpha * a * b, where c may be out itself or a row to broadcast; beta = 0 ignores
// c.
inline void addmm_out(const Tensor& out, const Tensor& c, const Tensor& a, const Tensor& b,
                      double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), beta, alpha));
}

// a + b, in the wider of their dtypes.
inline Tensor add(const Tensor& a, const Tensor& b) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1.0, &handle));
  return Tensor(handle);
}

// Ops below autograd record nothing, whatever mode their caller is in.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { set(false); }
  ~NoGrad() { set(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  void set(bool enabled) {
    if (before_) aoti_torch_grad_mode_set_enabled(enabled);
  }
  bool before_;
};

}  // namespace lora_kernels

// The few ATen calls that the stable ABI has no function for.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

namespace lora_kernels {

// The vendor's GEMM into memory that exists: out = a * b.
inline void mm_out(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                   const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = c + alpha * a * b, where c may be out itself or a row to broadcast.
inline void addmm_out(const torch::stable::Tensor& out, const torch::stable::Tensor& c,
                      const torch::stable::Tensor& a, const torch::stable::Tensor& b, double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), 1.0, alpha));
}

// Ops below autograd record nothing, whatever mode their caller is in.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace lora_kernels

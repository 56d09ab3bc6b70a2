// The CUDA ops. A kernel is registered here once it exists; backend.py asks the dispatcher which
// are.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "../cuda/down_proj.h"
#include "../cuda/dropout_mask.h"
#include "convert.h"
#include "stream.h"

namespace lora_kernels {
namespace {

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

void check_launch(cudaError_t error, const char* kernel, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " [", rows, ", ", cols,
                  "]: ", cudaGetErrorString(error));
}

void check_cuda_operand(const Operand& o, const Tensor& like, Dtype dtype, const char* op,
                        const char* name) {
  STD_TORCH_CHECK(o.matrix.dtype != Dtype::f32, op, ": ", name,
                  " must be bfloat16 or float16 on a CUDA device; for float32 take "
                  "backend='composed'");
  STD_TORCH_CHECK(o.matrix.dtype == dtype, op, ": ", name, " must have x's dtype");
  STD_TORCH_CHECK(o.tensor.device() == like.device(), op, ": ", name, " must be on x's device");
}

Tensor dropout_mask_cuda(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  OnDeviceOf device(seed);
  Tensor mask = torch::stable::empty({rows, cols}, ScalarType::Bool, std::nullopt, seed.device());
  DropoutMaskArgs args{static_cast<bool*>(mask.mutable_data_ptr()), rows, cols,
                       dropout_of(seed, threshold, "dropout_mask")};
  check_launch(launch_dropout_mask(args, current_stream(seed)), "dropout_mask", rows, cols);
  return mask;
}

// The arguments of down_proj with h left to fill in.
DownProjArgs down_proj_args(const Operand& x, const Operand& down, const OptionalTensor& seed,
                            int64_t threshold, double scale) {
  const char* op = "down_proj";
  check_size(down.cols, x.cols, op, "down.size(1)");
  check_cuda_operand(x, x.tensor, x.matrix.dtype, op, "x");
  check_cuda_operand(down, x.tensor, x.matrix.dtype, op, "down");
  if (seed.has_value())
    STD_TORCH_CHECK(seed->device() == x.tensor.device(), op, ": seed must be on x's device");
  const Dropout dropout = dropout_of(seed, threshold, op);
  const Matrix h{nullptr, down.rows, 1, x.matrix.dtype};
  return {x.matrix,
          down.matrix,
          h,
          x.rows,
          x.cols,
          down.rows,
          static_cast<float>(scale * inverse_keep(dropout)),
          dropout};
}

Tensor down_proj_cuda(const Tensor& x, const Tensor& down, const OptionalTensor& seed,
                      int64_t threshold, double scale) {
  const Operand rows = flatten_rows(x, "down_proj", "x"),
                ranks = operand(down, "down_proj", "down");
  DownProjArgs args = down_proj_args(rows, ranks, seed, threshold, scale);
  OnDeviceOf device(x);
  Tensor h = torch::stable::empty({args.M, args.r}, x.scalar_type(), std::nullopt, x.device());
  args.h.data = h.mutable_data_ptr();
  check_launch(launch_down_proj(args, x.get_device_index(), current_stream(x)), "down_proj", args.M,
               args.r);
  return h;
}

std::string down_proj_plan_cuda(const Tensor& x, const Tensor& down, const OptionalTensor& seed) {
  const Operand rows = flatten_rows(x, "down_proj", "x"),
                ranks = operand(down, "down_proj", "down");
  const DownProjArgs args = down_proj_args(rows, ranks, seed, 0, 1.0);
  OnDeviceOf device(x);
  DownProjPlan plan;
  check_launch(device_plan_down_proj(args, x.get_device_index(), &plan), "down_proj_plan", args.M,
               args.r);
  return describe(plan);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask_cuda));
  m.impl("down_proj", TORCH_BOX(&down_proj_cuda));
  m.impl("down_proj_plan", TORCH_BOX(&down_proj_plan_cuda));
}

}  // namespace lora_kernels

// The CPU ops of one projection.
#include <string>
#include <tuple>

#include "cpu_call.h"
#include "errors.h"
#include "library.h"

namespace lora_kernels {
namespace {

using namespace cpu;

Tensor dropout_mask_op(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "dropout_mask: rows and cols must not be negative");
  Tensor mask = empty_cpu({rows, cols}, ScalarType::Bool);
  if (cols == 0) return mask;
  DropoutMaskArgs args{static_cast<bool*>(mask.mutable_data_ptr()), rows, cols,
                       dropout_of(seed, threshold, "dropout_mask")};
  parallel(rows, 16, 16 * 8 * cols,
           [&](int64_t begin, int64_t end) { kernels().dropout_mask(args, begin, end); });
  return mask;
}

Tensor down_proj_op(const Tensor& x, const Tensor& down, const OptionalTensor& seed,
                    int64_t threshold, double scale) {
  return down_proj(flatten_rows(x, "down_proj", "x"), operand(down, "down_proj", "down"),
                   dropout_of(seed, threshold, "down_proj"), scale)
      .tensor;
}

Tensor fused_gemm_op(const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& up,
                     const OptionalTensor& bias, const OptionalTensor& seed, int64_t threshold,
                     double scale) {
  NoGrad no_grad;
  const char* op = "fused_gemm";
  return fused_gemm(x, flatten_rows(x, op, "x"), operand(weight, op, "weight"), operand(h, op, "h"),
                    operand(up, op, "up"), bias, dropout_of(seed, threshold, op), scale);
}

Tensor weight_grad_op(const Tensor& h, const Tensor& x, const OptionalTensor& seed,
                      int64_t threshold, double scale, bool wide, bool transpose) {
  return weight_grad(operand(h, "weight_grad", "h"), flatten_rows(x, "weight_grad", "x"),
                     dropout_of(seed, threshold, "weight_grad"), scale, wide, transpose);
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                      const Tensor& lora_b, const OptionalTensor& bias,
                                      const OptionalTensor& seed, int64_t threshold, double h_scale,
                                      double up_scale) {
  NoGrad no_grad;
  const char* op = "forward";
  const Operand x_rows = flatten_rows(x, op, "x");
  const Operand h =
      down_proj(x_rows, operand(lora_a, op, "lora_a"), dropout_of(seed, threshold, op), h_scale);
  Tensor y = fused_gemm(x, x_rows, operand(weight, op, "weight"), h, operand(lora_b, op, "lora_b"),
                        bias, {}, up_scale);
  return {y, h.tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const OptionalTensor& seed, int64_t threshold,
    double h_scale, double up_scale, bool wide_a, bool wide_b, bool need_x, bool need_a,
    bool need_b, bool need_bias) {
  NoGrad no_grad;
  const char* op = "backward";
  const Operand dy_rows = flatten_rows(dy, op, "dy"), a = operand(lora_a, op, "lora_a");
  const Operand b = operand(lora_b, op, "lora_b");
  const Dropout dropout = dropout_of(seed, threshold, op);
  // Every output is a tensor of its own: results of an op must not share memory.
  auto none = [&] { return empty_cpu({0}, x.scalar_type()); };

  Operand dh{};
  if (need_x || need_a) dh = down_proj(dy_rows, transposed(b), {}, h_scale);
  Tensor dx = need_x ? fused_gemm(dy, dy_rows, transposed(operand(weight, op, "weight")), dh,
                                  transposed(a), std::nullopt, dropout, up_scale)
                     : none();
  Tensor da =
      need_a ? weight_grad(dh, flatten_rows(x, op, "x"), dropout, up_scale, wide_a, false) : none();
  Tensor db =
      need_b ? weight_grad(operand(h, op, "h"), dy_rows, {}, up_scale, wide_b, true) : none();
  Tensor dbias = need_bias ? column_sums(dy_rows) : none();
  return {dx, da, db, dbias};
}

// Which copy of the CPU kernels this processor runs.
std::string cpu_isa_op() { return cpu::kernels().isa; }

}  // namespace

LK_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", LK_BOX(&cpu_isa_op));
  m.impl("use_16bit_gemm", LK_BOX(&cpu::set_vendor_multiplies));
}

LK_LIBRARY_IMPL(CPU, m) {
  m.impl("dropout_mask", LK_BOX(&dropout_mask_op));
  m.impl("down_proj", LK_BOX(&down_proj_op));
  m.impl("fused_gemm", LK_BOX(&fused_gemm_op));
  m.impl("weight_grad", LK_BOX(&weight_grad_op));
  m.impl("forward", LK_BOX(&forward_op));
  m.impl("backward", LK_BOX(&backward_op));
}

}  // namespace lora_kernels

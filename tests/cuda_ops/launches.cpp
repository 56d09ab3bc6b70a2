// What stands for a device: launches by the CPU kernels, and a journal of what was asked.
#include <cstring>
#include <string>
#include <vector>

#include "csrc/cpu/isa_baseline.cpp"
#include "csrc/cuda/backward.h"
#include "csrc/cuda/down_proj.h"
#include "csrc/cuda/dropout_mask.h"
#include "csrc/cuda/forward.h"
#include "csrc/cuda/group.h"
#include "journal.h"

namespace {

cudaError_t failure = cudaSuccess;  // of the next launch
int multiprocessors = 132, capability = 90;

}  // namespace

std::ostringstream& journal() {
  static std::ostringstream text;
  return text;
}

// ---- the runtime --------------------------------------------------------------------------------

cudaError_t cudaSetDevice(int device) {
  journal() << "device " << device << '\n';
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  journal() << "forgotten\n";
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "no such launch"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  journal() << "attribute " << device << '\n';
  *value = what == cudaDevAttrMultiProcessorCount      ? multiprocessors
           : what == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                       : capability % 10;
  return cudaSuccess;
}
// Of torch, in place of its own: each device has one stream, by which it is known.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(intptr_t{1000} + device);
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t device, void** guard) {
  journal() << "guard " << device << '\n';
  *guard = &failure;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) {
  journal() << "end\n";
  return 0;
}
}

// ---- launches -----------------------------------------------------------------------------------

namespace lora_kernels {
namespace {

const cpu::Kernels& kernels() { return cpu::baseline::table; }

Matrix turned(const Matrix& m) { return {m.data, m.col_stride, m.row_stride, m.dtype}; }
Matrix floats(std::vector<float>& memory, int64_t columns) {
  return {memory.data(), columns, 1, Dtype::f32};
}

// Writes all of the workspace that the plan asked for, with NaN.
cudaError_t launched(const char* name, cudaStream_t stream, const Target* target, void* workspace,
                     int64_t bytes) {
  journal() << name << " stream " << reinterpret_cast<intptr_t>(stream) - 1000;
  if (target != nullptr)
    journal() << " compute " << target->compute << " of " << target->multiprocessors;
  journal() << '\n';
  if (bytes > 0) std::memset(workspace, 0xff, static_cast<size_t>(bytes));
  const cudaError_t found = failure;
  failure = cudaSuccess;
  return found;
}

void down_proj(const DownProjArgs& a) {
  if (a.M > 0 && a.r > 0) kernels().down_proj(a, 0, a.M);
}
void weight_grad(const WeightGradArgs& a) {
  if (a.r > 0 && a.K > 0) kernels().weight_grad(a, 0, a.K);
}

// Adds x * weight^T to `sum`.
void add_product(const FusedGemmArgs& a, std::vector<float>& sum) {
  std::vector<float> product(sum.size());
  down_proj({a.x, a.weight, floats(product, a.N), a.M, a.K, a.N, 1.0f, {}});
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += product[i];
}
// y = sum + all that FusedGemmArgs adds to the product.
void finish(const FusedGemmArgs& a, std::vector<float>& sum, const Matrix& y) {
  if (a.M > 0 && a.N > 0)
    kernels().fused_gemm(
        {floats(sum, a.N), 0, 0, a.h, a.up, a.bias, y, a.M, a.N, a.r, a.scale, a.dropout}, 0, a.M,
        0, a.N);
}
void fused_gemm(const FusedGemmArgs& a) {
  std::vector<float> sum(a.M * a.N);
  add_product(a, sum);
  finish(a, sum, a.y);
}

// All but dx, whose share it gives to `dx`.
template <class F>
void gradients(const BackwardArgs& a, const F& dx) {
  std::vector<uint16_t> memory(a.M * a.r);
  const Matrix dh{memory.data(), a.r, 1, a.dy.dtype};
  if (a.need_x || a.need_a) down_proj({a.dy, turned(a.lora_b), dh, a.M, a.N, a.r, a.h_scale, {}});
  if (a.need_x)
    dx(FusedGemmArgs{a.dy,
                     turned(a.weight),
                     dh,
                     turned(a.lora_a),
                     {nullptr, 0, 0, a.dy.dtype},
                     a.dx,
                     a.M,
                     a.K,
                     a.N,
                     a.r,
                     a.masked_scale,
                     a.dropout});
  if (a.need_a) weight_grad({dh, a.x, a.da, a.M, a.K, a.r, a.masked_scale, a.dropout});
  if (a.need_b) weight_grad({a.h, a.dy, turned(a.db), a.M, a.N, a.r, a.up_scale, {}});
  static float one = 1.0f;
  if (a.need_bias) weight_grad({{&one, 0, 0, Dtype::f32}, a.dy, a.dbias, a.M, a.N, 1, 1.0f, {}});
}

}  // namespace

cudaError_t launch_dropout_mask(const DropoutMaskArgs& args, cudaStream_t stream) {
  kernels().dropout_mask(args, 0, args.rows);
  return launched("dropout_mask", stream, nullptr, nullptr, 0);
}
cudaError_t launch_down_proj(const DownProjArgs& args, const DownProjPlan&, cudaStream_t stream) {
  down_proj(args);
  return launched("down_proj", stream, nullptr, nullptr, 0);
}
cudaError_t launch_fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                              const Target& target, cudaStream_t stream) {
  fused_gemm(args);
  FusedGemmPlan placed = plan;
  return launched("fused_gemm", stream, &target, workspace, place_packed(placed));
}
cudaError_t launch_weight_grad(const WeightGradPass& pass, const WeightGradPlan& plan,
                               void* workspace, const Target& target, cudaStream_t stream) {
  weight_grad(pass.grad);
  WeightGradPlan placed = plan;
  return launched("weight_grad", stream, &target, workspace, place_weight_grad(pass, placed));
}
cudaError_t launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace,
                           const Target& target, cudaStream_t stream) {
  down_proj(args.down);
  fused_gemm(args.gemm);
  journal() << "form " << name_of(plan.form) << " tile " << plan.gemm.tile_n << " group "
            << plan.gemm.raster.group << '\n';
  return launched("forward", stream, &target, workspace, plan.workspace_bytes);
}
cudaError_t launch_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace,
                            const Target& target, cudaStream_t stream) {
  gradients(args, fused_gemm);
  const bool one = plan.form == BackwardForm::one_grid;
  const Raster& raster = one ? plan.grid.order.raster : plan.gemm.raster;
  journal() << "form " << (one ? "one_grid" : "passes") << " tile " << plan.gemm.tile_n << " group "
            << raster.group << '\n';
  return launched("backward", stream, &target, workspace, plan.workspace_bytes);
}
cudaError_t launch_forward_group(const ForwardArgs* args, int count, const ForwardGroupPlan& plan,
                                 void* workspace, const Target& target, cudaStream_t stream) {
  for (int i = 0; i < count; ++i) down_proj(args[i].down), fused_gemm(args[i].gemm);
  return launched("forward_group", stream, &target, workspace, plan.workspace_bytes);
}
// dx adds up every product, then every term, and is rounded once.
cudaError_t launch_backward_group(const BackwardArgs* args, int count,
                                  const BackwardGroupPlan& plan, void* workspace,
                                  const Target& target, cudaStream_t stream) {
  std::vector<float> sum(args[0].M * args[0].K);
  for (int i = 0; i < count; ++i) {
    BackwardArgs products = args[i];
    products.need_a = products.need_b = products.need_bias = false;
    gradients(products, [&](const FusedGemmArgs& dx) { add_product(dx, sum); });
  }
  for (int i = 0; i < count; ++i)
    gradients(args[i], [&](const FusedGemmArgs& dx) {
      finish(dx, sum, i + 1 < count ? floats(sum, dx.N) : dx.y);
    });
  return launched("backward_group", stream, &target, workspace, plan.workspace_bytes);
}

}  // namespace lora_kernels

// ---- of the tests -------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) const char* read_journal() {
  static std::string text;
  text = journal().str();
  journal().str("");
  return text.c_str();
}
extern "C" __attribute__((visibility("default"))) void next_launch_fails() {
  failure = cudaErrorInvalidValue;
}
extern "C" __attribute__((visibility("default"))) void use_device(int compute, int count) {
  capability = compute, multiprocessors = count;
}

// The CPU kernels at every vector width, on the host's baseline instructions: a machine runs only
// the one table that suits it, so the others would go untested.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "../csrc/cpu/isa_headers.h"

#define LK_ISA lanes4
#define LK_ISA_NAME "lanes4"
#define LK_LANES 4
#include "../csrc/cpu/isa.inl"
#undef LK_ISA
#undef LK_ISA_NAME
#undef LK_LANES

#define LK_ISA lanes8
#define LK_ISA_NAME "lanes8"
#define LK_LANES 8
#include "../csrc/cpu/isa.inl"
#undef LK_ISA
#undef LK_ISA_NAME
#undef LK_LANES

#define LK_ISA lanes16
#define LK_ISA_NAME "lanes16"
#define LK_LANES 16
#include "../csrc/cpu/isa.inl"

namespace py = pybind11;
using namespace lora_kernels;
using Array = py::array_t<float, py::array::c_style>;

static const cpu::Kernels& table(const std::string& name) {
  static const std::map<std::string, const cpu::Kernels*> tables = {
      {"lanes4", &cpu::lanes4::table},
      {"lanes8", &cpu::lanes8::table},
      {"lanes16", &cpu::lanes16::table}};
  return *tables.at(name);
}

static Matrix matrix(const Array& a) {
  return {const_cast<float*>(a.data()), a.shape(1), 1, Dtype::f32};
}

static Dropout dropout(const std::vector<int64_t>& seed, uint32_t threshold) {
  return {seed.empty() ? nullptr : seed.data(), static_cast<int>(seed.size()), threshold};
}

// The range is cut at `cut`, as two threads would.
static Array down_proj(const std::string& isa, const Array& x, const Array& down,
                       const std::vector<int64_t>& seed, uint32_t threshold, int64_t cut) {
  Array h({x.shape(0), down.shape(0)});
  DownProjArgs args{matrix(x),  matrix(down),  matrix(h), x.shape(0),
                    x.shape(1), down.shape(0), 1.0f,      dropout(seed, threshold)};
  table(isa).down_proj(args, 0, cut);
  table(isa).down_proj(args, cut, x.shape(0));
  return h;
}

static Array weight_grad(const std::string& isa, const Array& h, const Array& x,
                         const std::vector<int64_t>& seed, uint32_t threshold, int64_t cut) {
  Array grad({h.shape(1), x.shape(1)});
  WeightGradArgs args{matrix(h),  matrix(x),  matrix(grad), x.shape(0),
                      x.shape(1), h.shape(1), 1.0f,         dropout(seed, threshold)};
  table(isa).weight_grad(args, 0, cut);
  table(isa).weight_grad(args, cut, x.shape(1));
  return grad;
}

static Array fused_gemm(const std::string& isa, const Array& product, const Array& h,
                        const Array& up, const std::vector<int64_t>& seed, uint32_t threshold,
                        int64_t cut) {
  Array y({product.shape(0), product.shape(1)});
  cpu::FusedGemmTailArgs args{matrix(product),
                              0,
                              0,
                              matrix(h),
                              matrix(up),
                              {nullptr, 0, 0, Dtype::f32},
                              matrix(y),
                              product.shape(0),
                              product.shape(1),
                              h.shape(1),
                              1.0f,
                              dropout(seed, threshold)};
  table(isa).fused_gemm(args, 0, product.shape(0), 0, cut);
  table(isa).fused_gemm(args, 0, product.shape(0), cut, product.shape(1));
  return y;
}

PYBIND11_MODULE(isa_module, m) {
  m.def("down_proj", &down_proj);
  m.def("weight_grad", &weight_grad);
  m.def("fused_gemm", &fused_gemm);
}

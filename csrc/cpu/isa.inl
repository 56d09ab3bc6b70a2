// The kernels for one instruction set; included once by each isa_*.cpp, which sets the target.
// The namespace keeps the copies apart, and nothing here instantiates a template of the standard
// library: such code would be shared between the copies and could run where its instructions do
// not.
namespace lora_kernels::cpu {
namespace LK_ISA {

#include "simd.inl"
#include "mask.inl"
#include "tile.inl"
#include "microkernel.inl"
#include "down_proj.inl"
#include "fused_gemm.inl"
#include "weight_grad.inl"

extern const Kernels table;
const Kernels table = {LK_ISA_NAME, dropout_mask, down_proj, fused_gemm, weight_grad};

}  // namespace LK_ISA
}  // namespace lora_kernels::cpu

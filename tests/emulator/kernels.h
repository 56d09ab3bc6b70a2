// The kernels that the emulator runs, as launches that only miss a machine.
#pragma once
#include <vector>

#include "cuda/backward_group_plan.h"
#include "cuda/forward_group_plan.h"
#include "machine.h"

namespace emu {

// What launch_down_proj would launch, or nothing; args point into host memory.
std::vector<Launch> down_proj_launches(const lora_kernels::DownProjArgs& args,
                                       const lora_kernels::DownProjPlan& plan);
std::vector<Launch> down_proj_group_launches(const lora_kernels::DownProjArgs* each, int count,
                                             const lora_kernels::DownProjGroupPlan& plan);
// What launch_forward and launch_fused_gemm would, behind what is there, as a stream of its own.
// `fails`: the number of a launch that fails.
void add_forward(const lora_kernels::ForwardArgs& args, const lora_kernels::ForwardPlan& plan,
                 const lora_kernels::Target& target, void* workspace, std::vector<Launch>& launches,
                 int fails = -1);
void add_fused_gemm(const lora_kernels::FusedGemmArgs& args,
                    const lora_kernels::FusedGemmPlan& plan, const lora_kernels::Target& target,
                    void* workspace, std::vector<Launch>& launches);
void add_backward(const lora_kernels::BackwardArgs& args, const lora_kernels::BackwardPlan& plan,
                  const lora_kernels::Target& target, void* workspace,
                  std::vector<Launch>& launches, int fails = -1);
void add_forward_group(const lora_kernels::ForwardArgs* args, int count,
                       const lora_kernels::ForwardGroupPlan& plan,
                       const lora_kernels::Target& target, void* workspace,
                       std::vector<Launch>& launches, int fails = -1);
void add_backward_group(const lora_kernels::BackwardArgs* args, int count,
                        const lora_kernels::BackwardGroupPlan& plan,
                        const lora_kernels::Target& target, void* workspace,
                        std::vector<Launch>& launches, int fails = -1);
void add_weight_grad(const lora_kernels::WeightGradPass& pass,
                     const lora_kernels::WeightGradPlan& plan, const lora_kernels::Target& target,
                     void* workspace, std::vector<Launch>& launches);

// c [M, N] = a b^T in bf16 by probes.cuh; a is [M, K], or [K, M] if trans_a; b the same with N.
Launch gemm_probe_launch(const uint16_t* a, const uint16_t* b, uint16_t* c, int M, int N, int K,
                         int tile_n, bool trans_a, bool trans_b, int clusters);
// out = in through h, [64 tiles, 64] each; ticket and flags [tiles] start at 0.
Launch relay_probe_launch(const uint16_t* in, uint16_t* h, uint16_t* out, uint32_t* ticket,
                          uint32_t* flags, int tiles, int blocks);

}  // namespace emu

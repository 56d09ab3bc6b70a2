"""The operators' schemas, written here and nowhere else, and their C++ kernels if those are built.

    forward    h  = down_proj(x, A)              y  = fused_gemm(x, W0, h, B) + bias
    backward   dh = down_proj(dy, Bᵀ)            dx = fused_gemm(dy, W0ᵀ, dh, Aᵀ)
               dA = weight_grad(dh, x)           dB = weight_grad(h, dy)ᵀ

`forward` and `backward` run one of these lines in C++ (csrc/torch); a device serves them as soon as
its library registers them. `lora_linear` and `lora_linear_backward` are what torch.compile, export
and FlopCounterMode see: opaque, any backend, differentiable once. Backward takes x where lora_a
needs a gradient, else None.

Scales: h = h_scale · dropout(x)·Aᵀ is what is rounded and saved, and y = ... + up_scale · h·Bᵀ,
with h_scale · up_scale = scaling. `threshold` is T of the mask (`lora_kernels.dropout`). `wide`:
the gradient is float32 although x has 16 bits.

The same with `group` in their names: projections that share x, each with a seed of its own.
Autograd looks for tensors only in lists that hold nothing else, so in `lora_linear_group` an absent
bias is a tensor of no elements, and without dropout the list of seeds is empty.

`use_16bit_gemm`: in which dtypes the CPU kernels hand their frozen products to the vendor's GEMM as
they are, and not by way of float32.

`forward_triton` and `backward_triton` are the same lines in Triton, on any device that it serves.

`forward_as` and `forward_plan`: `forward` in a form of the caller's choice, "one_launch",
"two_launches" or "decode" (up to 64 rows), for tests and tuning; `backward_as` and `backward_plan`
likewise, "one_grid" or "passes", the plan being that of all three gradients. The form "sm80" takes
the kernels of sm_80 on any device.
"""

from __future__ import annotations

import functools

import torch

from . import _ops
from ._ops import add_op_namespace_prefix
from ._ops import ops as OPS

KERNELS = ("down_proj", "fused_gemm", "weight_grad")
CAPABILITY = (8, 0)  # of the oldest CUDA device with kernels
_FORWARD = (
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "int threshold, float h_scale, float up_scale) -> (Tensor y, Tensor h)"
)
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h, "
    "Tensor? seed, int threshold, float h_scale, float up_scale, bool wide_a, "
    "bool wide_b, bool need_x, bool need_a, bool need_b, bool need_bias) "
    "-> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)
SCHEMAS = (
    "cpu_isa() -> str",
    "use_16bit_gemm(bool bf16, bool fp16) -> ()",
    "has_sm90a() -> bool",
    "kernel_sources() -> str",
    "max_group() -> int",
    "down_proj_plan(Tensor x, Tensor down, Tensor? seed) -> str",
    "dropout_mask(Tensor seed, SymInt rows, SymInt cols, int threshold) -> Tensor",
    "down_proj(Tensor x, Tensor down, Tensor? seed, int threshold, float scale) -> Tensor",
    "fused_gemm(Tensor x, Tensor weight, Tensor h, Tensor up, Tensor? bias, Tensor? seed, "
    "int threshold, float scale) -> Tensor",
    "weight_grad(Tensor h, Tensor x, Tensor? seed, int threshold, float scale, bool wide, "
    "bool transpose) -> Tensor",
    f"forward{_FORWARD}",
    f"forward_triton{_FORWARD}",
    "forward_as(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "int threshold, float h_scale, float up_scale, str form, int tile_n, int group) "
    "-> (Tensor y, Tensor h)",
    "forward_plan(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? seed, str form, "
    "int tile_n, int group, float up_scale=1.0) -> str",
    f"backward{_BACKWARD}",
    f"backward_triton{_BACKWARD}",
    "backward_as(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h, "
    "Tensor? seed, int threshold, float h_scale, float up_scale, bool wide_a, "
    "bool wide_b, bool need_x, bool need_a, bool need_b, bool need_bias, str form, int tile_n, "
    "int group) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)",
    "backward_plan(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? seed, str form, "
    "int tile_n, int group, float up_scale=1.0) -> str",
    "forward_group(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor?[] biases, Tensor?[] seeds, int threshold, float[] h_scales, float[] up_scales) "
    "-> (Tensor[] ys, Tensor[] hs)",
    "backward_group(Tensor x, Tensor[] dys, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor[] hs, Tensor?[] seeds, int threshold, float[] h_scales, float[] up_scales, "
    "bool[] wide_a, bool[] wide_b, bool need_x, bool[] need_a, bool[] need_b, bool[] need_bias) "
    "-> (Tensor dx, Tensor[] das, Tensor[] dbs, Tensor[] dbiases)",
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
    "Tensor? seed, float scaling, float dropout_p, str backend) -> (Tensor y, Tensor h)",
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "Tensor h, Tensor? seed, float scaling, float dropout_p, str backend, bool need_x, "
    "bool need_a, bool need_b, bool need_bias) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)",
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor[] biases, Tensor[] seeds, float[] scalings, float dropout_p, str backend) "
    "-> (Tensor[] ys, Tensor[] hs)",
    "lora_linear_group_backward(Tensor? x, Tensor[] dys, Tensor[] weights, Tensor[] lora_as, "
    "Tensor[] lora_bs, Tensor[] hs, Tensor[] seeds, float[] scalings, float dropout_p, "
    "str backend, bool need_x, bool[] need_a, bool[] need_b, bool[] need_bias) "
    "-> (Tensor dx, Tensor[] das, Tensor[] dbs, Tensor[] dbiases)",
)
LIBRARY = torch.library.Library(OPS.name, "DEF")
for schema in SCHEMAS:
    # Kernels take any strides; the tag keeps a compiler from changing those that eager mode passes.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))

EXTENSION_ERROR: str | None = getattr(_ops, "EXTENSION_ERROR", None)  # kernel-builder's has none


def has_kernel(op: str, device: str) -> bool:
    """Whether C++ serves this op on "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(op), device)


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether the sm_90a kernels run on this CUDA device; others take those of sm_80."""
    return torch.cuda.get_device_capability(device) == (9, 0) and OPS.has_sm90a()


def runs_here(op: str, device: str) -> bool:
    """Whether C++ serves this op on "CPU", or on the current device of "CUDA"."""
    if not has_kernel(op, device):
        return False
    return device != "CUDA" or torch.cuda.get_device_capability() >= CAPABILITY

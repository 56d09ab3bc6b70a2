"""`forward` and `backward` of the schemas, of the three kernels: backend `triton`.

forward    h  = down_proj(x, A)              y  = fused_gemm(x, W0, h, B) + bias
backward   dh = down_proj(dy, Bᵀ)            dx = fused_gemm(dy, W0ᵀ, dh, Aᵀ)
           dA = weight_grad(dh, x)           dB = weight_grad(h, dy)ᵀ
"""

from __future__ import annotations

from torch import Tensor

from . import configs
from .device import rows_of
from .down_proj import down_proj
from .dropout import masks_of
from .fused_gemm import can_describe, fused_gemm
from .weight_grad import down_and_weight_grad, grad_and_sums, one_read, weight_grad

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None,
    seed: Tensor | None, threshold: int, h_scale: float, up_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [..., N], h [M, r]), as `composed.forward`."""
    seed = None if seed is None else seed.contiguous()
    h = down_proj(x, lora_a, seed, threshold, h_scale)
    return fused_gemm(x, weight, h, lora_b, bias, None, 0, up_scale), h


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, h: Tensor,
    seed: Tensor | None, threshold: int, h_scale: float, up_scale: float, wide_a: bool,
    wide_b: bool, need_x: bool, need_a: bool, need_b: bool, need_bias: bool,
) -> Grads:  # fmt: skip
    """(dx, dA, dB, dbias), empty where not needed, as `composed.backward`."""
    dx, da, db, dbias, dh = (x.new_empty(0) for _ in range(5))
    h, seed = h.contiguous(), None if seed is None else seed.contiguous()
    need_dh = need_x or need_a
    if one_read(dy, lora_b.shape[1]):
        if need_dh or need_b or need_bias:
            dh, db, dbias = down_and_weight_grad(
                h, dy, lora_b.t(), h_scale, up_scale, wide_b, need_b, need_bias
            )
    else:
        if need_dh:
            dh = down_proj(dy, lora_b.t(), None, 0, h_scale)
        if need_b or need_bias:
            grad, dbias = grad_and_sums(h, dy, None, 0, up_scale, wide_b, True, need_bias)
            db = grad if need_b else db
    if need_x:
        dx = fused_gemm(dy, weight.t(), dh, lora_a.t(), None, seed, threshold, up_scale)
    if need_a:
        da = weight_grad(dh, x, seed, threshold, up_scale, wide_a, False)
    return dx, da, db, dbias


def plan(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, seed: Tensor | None, up_scale: float
) -> str:
    """What the forward pass would launch, for `explain`."""
    x, r = rows_of(x), lora_a.shape[0]
    down = configs.of("down_proj", r, masks_of(seed)[0], x)
    gemm = configs.of("fused_gemm", x.shape[0], 0, x, weight)
    kind = gemm.kind
    if kind == "descriptors" and not can_describe(x, weight):
        kind = "persistent"
    return (
        f"Triton: down_proj {down.rows}x{down.rank}x{down.depth}, then fused_gemm "
        f"{gemm.rows}x{gemm.cols}x{gemm.depth} ({kind})"
    )

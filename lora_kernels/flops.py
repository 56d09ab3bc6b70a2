"""FLOPs of the operators for torch.utils.flop_counter: 2 per multiply-add, GEMMs only."""

from __future__ import annotations

import math

from torch.utils.flop_counter import register_flop_formula

from . import schemas  # noqa: F401  defines them
from ._ops import ops as OPS


def _gemm(rows: int, cols: int, depth: int) -> int:
    return 2 * rows * cols * depth


def _rows(shape) -> int:
    return math.prod(shape[:-1])


@register_flop_formula(OPS.dropout_mask)
def dropout_mask(*args, **kwargs) -> int:
    return 0


@register_flop_formula(OPS.down_proj)
def down_proj(x, down, *args, **kwargs) -> int:
    return _gemm(_rows(x), down[0], down[1])


@register_flop_formula(OPS.fused_gemm)
def fused_gemm(x, weight, h, up, *args, **kwargs) -> int:
    return _gemm(_rows(x), weight[0], weight[1]) + _gemm(_rows(x), up[0], up[1])


@register_flop_formula(OPS.weight_grad)
def weight_grad(h, x, *args, **kwargs) -> int:
    return _gemm(h[1], x[-1], h[0])


@register_flop_formula([OPS.forward, OPS.forward_triton, OPS.lora_linear])
def forward(x, weight, lora_a, lora_b, *args, **kwargs) -> int:
    n, k = weight
    return _gemm(_rows(x), n, k) + _gemm(_rows(x), lora_a[0], k + n)


@register_flop_formula([OPS.forward_group, OPS.lora_linear_group])
def forward_group(x, weights, lora_as, lora_bs, *args, **kwargs) -> int:
    return sum(forward(x, *one) for one in zip(weights, lora_as, lora_bs, strict=True))


@register_flop_formula([OPS.backward, OPS.backward_triton, OPS.lora_linear_backward])
def backward(dy, x, weight, lora_a, lora_b, *args, **kwargs) -> int:
    need_x, need_a, need_b = args[-4:-1]
    (n, k), r, m = weight, lora_a[0], _rows(dy)
    dh = _gemm(m, r, n) if need_x or need_a else 0
    dx = _gemm(m, k, n) + _gemm(m, k, r) if need_x else 0
    return dh + dx + (_gemm(m, r, k) if need_a else 0) + (_gemm(m, r, n) if need_b else 0)


@register_flop_formula([OPS.backward_group, OPS.lora_linear_group_backward])
def backward_group(x, dys, weights, lora_as, lora_bs, *args, **kwargs) -> int:
    need_x, *needs = args[-4:]
    each = zip(dys, weights, lora_as, lora_bs, *needs, strict=True)
    return sum(backward(dy, x, w, a, b, need_x, *need) for dy, w, a, b, *need in each)

"""Backend `composed`: the vendor's GEMMs, with the up projection accumulated in place by addmm.

Serves every device, dtype and shape that torch.mm does. The frozen product is rounded once before
the rank-r term is added, and with dropout a mask and a dropped copy of x live for the length of
one GEMM; neither is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import autocast, dropout

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def _outside_autocast(run: Callable) -> Callable:
    """Operands are cast before they come here: inside, autocast would cast fp32 ones once more."""

    @functools.wraps(run)
    def wrapper(first: Tensor, *args):
        with autocast.off(first.device.type):
            return run(first, *args)

    return wrapper


def down_proj(x: Tensor, down: Tensor, seed: Tensor | None, threshold: int, scale: float) -> Tensor:
    """h [M, r] = scale · dropout(x) · downᵀ, scaled before its one rounding."""
    x = _rows(x)
    if seed is not None:
        mask = torch.ops.lora_kernels.dropout_mask(seed, x.shape[0], x.shape[1], threshold)
        x = torch.where(mask, x, 0)
        scale *= _inverse_keep(threshold)
    h = x.new_empty(x.shape[0], down.shape[0])
    return h.addmm_(x, down.t(), beta=0, alpha=scale)


def fused_gemm(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: float,
) -> Tensor:
    """y [..., N] = x · weightᵀ + mask/q ∘ (scale · h · upᵀ) + bias."""
    # Allocated at its final shape: callers modify y in place, which autograd forbids of a view.
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, x = y.view(h.shape[0], weight.shape[0]), _rows(x)
    if bias is None:
        torch.mm(x, weight.t(), out=rows)
    else:
        torch.addmm(bias, x, weight.t(), out=rows)
    if seed is None:
        rows.addmm_(h, up.t(), alpha=scale)
    else:
        mask = torch.ops.lora_kernels.dropout_mask(seed, rows.shape[0], rows.shape[1], threshold)
        term = rows.new_empty(rows.shape)
        term.addmm_(h, up.t(), beta=0, alpha=scale * _inverse_keep(threshold))
        rows.add_(torch.where(mask, term, 0))
    return y


def weight_grad(
    h: Tensor,
    x: Tensor,
    seed: Tensor | None,
    threshold: int,
    scale: float,
    wide: bool,
    transpose: bool,
) -> Tensor:
    """grad [r, K] = scale · hᵀ · dropout(x), or its transpose."""
    x = _rows(x)
    if seed is not None:
        mask = torch.ops.lora_kernels.dropout_mask(seed, x.shape[0], x.shape[1], threshold)
        x = torch.where(mask, x, 0)
        scale *= _inverse_keep(threshold)
    left, right = (x, h) if transpose else (h, x)
    if wide and x.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32).mul_(scale)
    if wide:  # only CUDA's GEMM writes fp32 from 16 bits
        left, right = left.float(), right.float()
    grad = left.new_empty(left.shape[1], right.shape[1])
    return grad.addmm_(left.t(), right, beta=0, alpha=scale)


def data_flow(
    down_proj: Callable, fused_gemm: Callable, weight_grad: Callable
) -> tuple[Callable, Callable]:
    """(forward, backward) of `schemas`, of three kernels: what every backend in Python runs."""

    @_outside_autocast
    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        threshold: int,
        h_scale: float,
        up_scale: float,
    ) -> tuple[Tensor, Tensor]:
        h = down_proj(x, lora_a, seed, threshold, h_scale)
        return fused_gemm(x, weight, h, lora_b, bias, None, 0, up_scale), h

    @_outside_autocast
    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        h: Tensor,
        seed: Tensor | None,
        threshold: int,
        h_scale: float,
        up_scale: float,
        wide_a: bool,
        wide_b: bool,
        need_x: bool,
        need_a: bool,
        need_b: bool,
        need_bias: bool,
    ) -> Grads:
        # Every output is a tensor of its own: results of an op must not share memory.
        dx, da, db, dbias = (x.new_empty(0) for _ in range(4))
        if need_x or need_a:
            dh = down_proj(dy, lora_b.t(), None, 0, h_scale)
            if need_x:
                dx = fused_gemm(dy, weight.t(), dh, lora_a.t(), None, seed, threshold, up_scale)
            if need_a:
                da = weight_grad(dh, x, seed, threshold, up_scale, wide_a, False)
        if need_b:
            db = weight_grad(h, dy, None, 0, up_scale, wide_b, True)
        if need_bias:
            dbias = _rows(dy).sum(0)
        return dx, da, db, dbias

    return forward, backward


forward, backward = data_flow(down_proj, fused_gemm, weight_grad)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _inverse_keep(threshold: int) -> float:
    # Nothing survives q = 0, so its inverse multiplies nothing.
    return dropout.RANGE / max(dropout.RANGE - threshold, 1)

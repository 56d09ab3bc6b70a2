"""Backend `composed`: the vendor's GEMMs, with the up projection accumulated in place by addmm.

Serves every device, dtype and shape that torch.mm does. The frozen product is rounded once before
the rank-r term is added, and with dropout a mask and a dropped copy of x live for the length of
one GEMM; neither is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import autocast, dropout
from ._ops import ops as OPS

Grads = tuple[Tensor, Tensor, Tensor, Tensor]
GroupGrads = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


def _outside_autocast(run: Callable) -> Callable:
    """Operands are cast before they come here: inside, autocast would cast fp32 ones once more."""

    @functools.wraps(run)
    def wrapper(first: Tensor, *args):
        with autocast.off(first.device.type):
            return run(first, *args)

    return wrapper


def down_proj(x: Tensor, down: Tensor, seed: Tensor | None, threshold: int, scale: float) -> Tensor:
    """h [M, r] = scale · dropout(x) · downᵀ, scaled before its one rounding."""
    x = rows_of(x)
    if seed is not None:
        mask = OPS.dropout_mask(seed, x.shape[0], x.shape[1], threshold)
        x = torch.where(mask, x, 0)
        scale *= dropout.inverse_keep(threshold)
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
    rows, x = y.view(h.shape[0], weight.shape[0]), rows_of(x)
    if bias is None:
        torch.mm(x, weight.t(), out=rows)
    else:
        torch.addmm(bias, x, weight.t(), out=rows)
    _add_up_projection(rows, h, up, seed, threshold, scale)
    return y


def _add_up_projection(rows, h, up, seed, threshold, scale) -> None:
    if seed is None:
        rows.addmm_(h, up.t(), alpha=scale)
    else:
        mask = OPS.dropout_mask(seed, rows.shape[0], rows.shape[1], threshold)
        term = rows.new_empty(rows.shape)
        term.addmm_(h, up.t(), beta=0, alpha=scale * dropout.inverse_keep(threshold))
        rows.add_(torch.where(mask, term, 0))


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
    x = rows_of(x)
    if seed is not None:
        mask = OPS.dropout_mask(seed, x.shape[0], x.shape[1], threshold)
        x = torch.where(mask, x, 0)
        scale *= dropout.inverse_keep(threshold)
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
            dbias = rows_of(dy).sum(0)
        return dx, da, db, dbias

    return forward, backward


forward, backward = data_flow(down_proj, fused_gemm, weight_grad)


def group_flow(forward: Callable, backward_after: Callable) -> tuple[Callable, Callable]:
    """(forward_group, backward_group) of `schemas`, one projection after the other.

    `backward_after(dx)`: the backward of a projection that returns its dx added to that of those
    before it, or None for the first, in place.
    """

    def forward_group(
        x: Tensor,
        weights: list[Tensor],
        lora_as: list[Tensor],
        lora_bs: list[Tensor],
        biases: list[Tensor | None],
        seeds: list[Tensor | None],
        threshold: int,
        h_scales: list[float],
        up_scales: list[float],
    ) -> tuple[list[Tensor], list[Tensor]]:
        operands = zip(weights, lora_as, lora_bs, biases, seeds, strict=True)
        scales = zip(h_scales, up_scales, strict=True)
        each = [forward(x, *o, threshold, *s) for o, s in zip(operands, scales, strict=True)]
        return [y for y, _ in each], [h for _, h in each]

    def backward_group(
        x: Tensor,
        dys: list[Tensor],
        weights: list[Tensor],
        lora_as: list[Tensor],
        lora_bs: list[Tensor],
        hs: list[Tensor],
        seeds: list[Tensor | None],
        threshold: int,
        h_scales: list[float],
        up_scales: list[float],
        wide_a: list[bool],
        wide_b: list[bool],
        need_x: bool,
        need_a: list[bool],
        need_b: list[bool],
        need_bias: list[bool],
    ) -> GroupGrads:
        dx: Any = None
        grads: list[list[Tensor]] = []
        operands = zip(weights, lora_as, lora_bs, hs, seeds, strict=True)
        scalars = zip(h_scales, up_scales, wide_a, wide_b, strict=True)
        needs = zip(need_a, need_b, need_bias, strict=True)
        for dy, o, s, n in zip(dys, operands, scalars, needs, strict=True):
            dx, *rest = backward_after(dx)(dy, x, *o, threshold, *s, need_x, *n)
            grads.append(rest)
        das, dbs, dbiases = map(list, zip(*grads, strict=True))
        return dx, das, dbs, dbiases

    return forward_group, backward_group


def sliced_flow(
    forward_group: Callable, backward_group: Callable, size: Callable[[], int]
) -> tuple[Callable, Callable]:
    """(forward_group, backward_group) of any number of projections, at most `size()` at a time."""

    def slices(run: Callable, x: Tensor, args: tuple) -> list[tuple]:
        step, count = size(), len(args[0])
        return [
            run(x, *(a[i : i + step] if isinstance(a, (list, tuple)) else a for a in args))
            for i in range(0, count, step)
        ]

    def join(lists: Iterable[list[Tensor]]) -> list[Tensor]:
        return [one for each in lists for one in each]

    def forward(x: Tensor, *args) -> tuple[list[Tensor], list[Tensor]]:
        ys, hs = zip(*slices(forward_group, x, args), strict=True)
        return join(ys), join(hs)

    def backward(x: Tensor, *args) -> GroupGrads:
        (dx, *more), das, dbs, dbiases = zip(*slices(backward_group, x, args), strict=True)
        for other in more:
            dx.add_(other)
        return dx, join(das), join(dbs), join(dbiases)

    return forward, backward


def adding(backward: Callable) -> Callable:
    """`backward_after` of a backward that knows of no other: its dx is added once it is there."""

    def after(dx: Tensor | None) -> Callable:
        def run(*args):
            more, *rest = backward(*args)
            return more if dx is None else dx.add_(more), *rest

        return run

    return after


def _backward_after(dx: Tensor | None) -> Callable:
    """The vendor's GEMMs add to dx themselves."""
    if dx is None:
        return backward
    return data_flow(down_proj, functools.partial(_add_fused_gemm, dx), weight_grad)[1]


def _add_fused_gemm(dx, dy, weight, dh, up, bias, seed, threshold, scale) -> Tensor:
    rows = dx.view(dh.shape[0], weight.shape[0]).addmm_(rows_of(dy), weight.t())
    _add_up_projection(rows, dh, up, seed, threshold, scale)
    return dx


group_forward, group_backward = group_flow(forward, _backward_after)


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], a view wherever its strides allow one."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])

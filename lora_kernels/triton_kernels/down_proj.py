"""h [M, r] = scale · dropout(x) · downᵀ: one read of x, the mask drawn in registers.

A program sums `span` columns of ROWS rows for RANK ranks. Where rows alone would leave the device
idle, the columns are split among programs, and `reduce` adds their fp32 results in order. Serves h
(down = A) and dh (x = dy, down = Bᵀ).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import inverse_keep
from . import configs, dropout
from .device import launching_on, precision, rows_of
from .reduce import reduce_parts


@triton.jit(do_not_specialize=["m", "r", "span", "threshold", "scale"])
def down_proj_kernel(
    x, down, h, seed,
    m, k, r, span,
    x_row, x_col, down_row, down_col, h_row, h_part,  # strides
    threshold, scale,
    DROPOUT: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * span
    row0, col0 = dropout.origin(seed, WINDOW)
    rows = row - row0 + tl.arange(0, ROWS)
    cols = first - col0 + tl.arange(0, DEPTH)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    here = (rows >= 0) & (rows < m)
    x_tile = x + rows.to(tl.int64)[:, None] * x_row + cols[None, :] * x_col
    down_tile = down + ranks.to(tl.int64)[None, :] * down_row + cols[:, None] * down_col

    total = tl.zeros((ROWS, RANK), tl.float32)
    for depth in range(first, tl.minimum(first + span, k + col0), DEPTH):
        inside = (cols >= 0) & (cols < k)
        left = tl.load(x_tile, here[:, None] & inside[None, :], other=0.0)
        right = tl.load(down_tile, inside[:, None] & (ranks < r)[None, :], other=0.0)
        if DROPOUT:
            keep = dropout.keep_tile(seed, row, depth, threshold, WINDOW, ROWS, DEPTH)
            left = tl.where(keep, left, tl.zeros_like(left))
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_tile += DEPTH * x_col
        down_tile += DEPTH * down_col
        cols += DEPTH

    place = h + tl.program_id(1).to(tl.int64) * h_part
    place += rows.to(tl.int64)[:, None] * h_row + ranks[None, :]
    stored = (total * scale).to(h.dtype.element_ty)
    tl.store(place, stored, here[:, None] & (ranks < r)[None, :])


def down_proj(x: Tensor, down: Tensor, seed: Tensor | None, threshold: int, scale: float) -> Tensor:
    """h [M, r] in x's dtype, summed in fp32, scaled and rounded once.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides.
        down: [r, K] of x's dtype, any strides.
        seed: of the mask on x, int64 [2] or [4]; None: there is none.
        threshold: T of the mask (lora_kernels/dropout.py).
        scale: factor of h; 1/q is put to it where there is a mask.

    Equivalent to::

        h = scale * torch.where(mask, x / q, 0) @ down.t()
    """
    x = rows_of(x)
    (m, k), r = x.shape, down.shape[0]
    h = x.new_empty(m, r)
    if h.numel() == 0:
        return h
    if seed is not None:
        scale *= inverse_keep(threshold)
    window = seed is not None and seed.shape[0] == 4
    config = configs.down_proj(x, r)
    rows, cols = (m + 15, k + 15) if window else (m, k)  # a window may begin inside a block of 16
    row_blocks, rank_blocks = triton.cdiv(rows, config.rows), triton.cdiv(r, config.rank)
    span, splits = config.split(cols, row_blocks * rank_blocks)
    parts = h if splits == 1 else torch.empty(splits, m, r, dtype=torch.float32, device=x.device)
    with launching_on(x):
        down_proj_kernel[row_blocks, splits, rank_blocks](
            x, down, parts, seed if seed is not None else x,
            m, k, r, span, *x.stride(), *down.stride(), r, m * r,
            threshold, float(scale) if splits == 1 else 1.0,
            DROPOUT=seed is not None, WINDOW=window, PRECISION=precision(x),
            ROWS=config.rows, DEPTH=config.depth, RANK=config.rank,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if splits > 1:
            reduce_parts(parts, h, scale)
    return h

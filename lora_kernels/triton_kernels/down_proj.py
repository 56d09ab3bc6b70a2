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
from .configs import cdiv
from .device import launching_on, precision, rows_of
from .ranks import known, rank_block, ranks_of
from .reduce import reduce_parts


@triton.jit(do_not_specialize=["m", "span", "threshold", "scale"])
def down_proj_kernel(
    x, down, h, seed,
    m, k, r, span,
    x_row, x_col, down_row, down_col, h_part,  # strides
    threshold, scale,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    if not dropout.is_meant(seed, MASK):
        return
    row_block, ranks = ranks_of(tl.program_id(0), r, EXACT, RANK)
    row, first = row_block * ROWS, tl.program_id(1).to(tl.int64) * span
    first = tl.multiple_of(first, 16)  # vector loads need it; span is a multiple of DEPTH
    row0, col0 = dropout.origin(seed, MASK)
    rows = row - row0 + tl.arange(0, ROWS)
    cols = first - col0 + tl.arange(0, DEPTH)
    here = dropout.within(rows, m, MASK)[:, None]
    x_tile = x + rows.to(tl.int64)[:, None] * x_row + cols[None, :] * x_col
    down_tile = down + ranks.to(tl.int64)[None, :] * down_row + cols[:, None] * down_col

    total = tl.zeros((ROWS, RANK), tl.float32)
    for depth in range(first, tl.minimum(first + span, k + col0), DEPTH):
        inside = dropout.within(cols, k, MASK)
        left = tl.load(x_tile, here & inside[None, :], other=0.0)
        right = tl.load(down_tile, known(inside[:, None], ranks, r, EXACT), other=0.0)
        if MASK:
            keep = dropout.keep_tile(seed, row, depth, threshold, MASK, ROWS, DEPTH)
            left = tl.where(keep, left, tl.zeros_like(left))
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_tile += DEPTH * tl.cast(x_col, tl.int64)
        down_tile += DEPTH * tl.cast(down_col, tl.int64)
        cols += DEPTH

    place = h + tl.program_id(1).to(tl.int64) * h_part
    place += rows.to(tl.int64)[:, None] * (RANK if EXACT else r) + ranks[None, :]
    stored = (total * scale).to(h.dtype.element_ty)
    tl.store(place, stored, known(here, ranks, r, EXACT))


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
    h = x.new_empty(x.shape[0], down.shape[0])
    if h.numel() > 0:
        with launching_on(x):
            for mask in dropout.masks_of(seed):
                _launch(x, down, h, seed, mask, threshold, scale)
    return h


def _launch(x, down, h, seed, mask, threshold, scale) -> None:
    (m, k), r = x.shape, down.shape[0]
    shift = dropout.most_shift(mask)
    config = configs.of("down_proj", r, mask, x)
    rank = rank_block(r, config)
    programs = cdiv(m + shift, config.rows) * cdiv(r, rank)
    span, splits = config.split(k + shift, programs, config.depth)
    scale = float(scale * (inverse_keep(threshold) if mask else 1.0))
    parts = h if splits == 1 else x.new_empty(splits, m, r, dtype=torch.float32)
    down_proj_kernel[programs, splits](
        x, down, parts, seed if mask else x,
        m, k, r, span, *x.stride(), *down.stride(), m * r,
        threshold, scale if splits == 1 else 1.0,
        MASK=mask, PRECISION=precision(x), EXACT=r == rank,
        ROWS=config.rows, DEPTH=config.depth, RANK=rank,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        reduce_parts(parts, h, scale, seed, mask)

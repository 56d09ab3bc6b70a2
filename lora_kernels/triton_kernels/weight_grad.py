"""grad [r, K] = scale · hᵀ · dropout(x), or its transpose: one read of x, no atomics.

Rows are cut into chunks, whose sums are independent programs; `reduce` adds their fp32 results in
order. Serves dA (h = dh) and dB (x = dy, transposed), and gives dbias, the sums of dy's columns,
from the same read. Of few ranks `down_and_weight_grad` makes dh of that read too: then dy is read
once for dh, dB and dbias.
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

MOST_BYTES = 1 << 28  # of the partial gradients of `down_and_weight_grad`


@triton.jit(do_not_specialize=["m", "span", "threshold", "scale"])
def weight_grad_kernel(
    h, x, grad, sums, seed,
    m, k, r, span,
    x_row, x_col, grad_rank, grad_col, grad_part,  # strides
    threshold, scale,
    SUMS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    if not dropout.is_meant(seed, MASK):
        return
    row0, col0 = dropout.origin(seed, MASK)
    col_block, ranks = ranks_of(tl.program_id(0), r, EXACT, RANK)
    col, chunk = col_block * COLS, tl.program_id(1).to(tl.int64)
    first = chunk * span
    cols = col - col0 + tl.arange(0, COLS)
    rows = first - row0 + tl.arange(0, ROWS)
    there = dropout.within(cols, k, MASK)[:, None]
    h_row = RANK if EXACT else r
    h_tile = h + rows[:, None] * h_row + ranks[None, :]
    x_tile = x + rows[None, :] * x_row + cols.to(tl.int64)[:, None] * x_col  # transposed

    total = tl.zeros((COLS, RANK), tl.float32)
    column_sums = tl.zeros((COLS,), tl.float32)
    for row in range(first, tl.minimum(first + span, m + row0), ROWS):
        here = dropout.within(rows, m, MASK)
        left = tl.load(x_tile, there & here[None, :], other=0.0)
        right = tl.load(h_tile, known(here[:, None], ranks, r, EXACT), other=0.0)
        if SUMS:
            column_sums += tl.sum(left.to(tl.float32), 1)
        if MASK:
            keep = dropout.keep_tile(seed, row, col, threshold, MASK, ROWS, COLS)
            left = tl.where(tl.trans(keep), left, tl.zeros_like(left))
        total = tl.dot(left, right, total, input_precision=PRECISION)
        h_tile += ROWS * h_row
        x_tile += ROWS * tl.cast(x_row, tl.int64)
        rows += ROWS

    place = grad + chunk * grad_part + cols.to(tl.int64)[:, None] * grad_col
    place += ranks.to(tl.int64)[None, :] * grad_rank
    stored = (total * scale).to(grad.dtype.element_ty)
    tl.store(place, stored, known(there, ranks, r, EXACT))
    if SUMS:  # all blocks of ranks see the same x
        written = dropout.within(cols, k, MASK) & (tl.min(ranks, 0) == 0)
        tl.store(sums + chunk * k + cols, column_sums.to(sums.dtype.element_ty), written)


@triton.jit(do_not_specialize=["m", "span"])
def down_and_weight_grad_kernel(
    h, dy, down, dh, grad, sums,
    m, n, r, span,
    dy_row, dy_col, down_row, down_col, dh_part,  # strides
    GRAD: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows and `span` columns of dy: a part of dh, and parts of dB and dbias of its own."""
    block = tl.program_id(0).to(tl.int64)
    rows, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * span
    first = tl.multiple_of(first, 16)  # vector loads need it; span is a multiple of COLS
    ranks, cols = tl.arange(0, RANK), first + tl.arange(0, COLS)
    here, width = (rows < m)[:, None], (RANK if EXACT else r)
    dy_tile = dy + rows.to(tl.int64)[:, None] * dy_row + cols.to(tl.int64)[None, :] * dy_col
    down_tile = down + ranks[None, :] * down_row + cols.to(tl.int64)[:, None] * down_col
    h_at = rows.to(tl.int64)[:, None] * width + ranks[None, :]
    kept = tl.load(h + h_at, known(here, ranks, r, EXACT), other=0.0)

    total = tl.zeros((ROWS, RANK), tl.float32)
    for _ in range(first, tl.minimum(first + span, n), COLS):
        there = cols < n
        tile = tl.load(dy_tile, here & there[None, :], other=0.0)
        right = tl.load(down_tile, known(there[:, None], ranks, r, EXACT), other=0.0)
        total = tl.dot(tile, right, total, input_precision=PRECISION)
        if GRAD:
            part = tl.dot(tl.trans(tile), kept, input_precision=PRECISION)
            place = grad + (block * n + cols)[:, None] * width + ranks[None, :]
            tl.store(place, part, known(there[:, None], ranks, r, EXACT))
        if SUMS:
            tl.store(sums + block * n + cols, tl.sum(tile.to(tl.float32), 0), there)
        dy_tile += COLS * tl.cast(dy_col, tl.int64)
        down_tile += COLS * tl.cast(down_col, tl.int64)
        cols += COLS
    place = dh + tl.program_id(1).to(tl.int64) * dh_part + h_at
    tl.store(place, total, known(here, ranks, r, EXACT))


def weight_grad(
    h: Tensor,
    x: Tensor,
    seed: Tensor | None,
    threshold: int,
    scale: float,
    wide: bool,
    transpose: bool,
) -> Tensor:
    """grad [r, K], or [K, r] with `transpose`, in x's dtype or, if `wide`, fp32; rounded once.

    Args:
        h: [M, r] contiguous, of x's dtype.
        x: [..., K] fp32, fp16 or bf16, any strides.
        seed: of the mask on x, int64 [2] or [4]; None: there is none.
        threshold: T of the mask (lora_kernels/dropout.py).
        scale: factor of the gradient; 1/q is put to it where there is a mask.

    Equivalent to::

        grad = scale * h.t() @ torch.where(mask, x / q, 0)
    """
    return grad_and_sums(h, x, seed, threshold, scale, wide, transpose, False)[0]


def grad_and_sums(
    h, x, seed, threshold, scale, wide, transpose, need_sums
) -> tuple[Tensor, Tensor]:
    """(`weight_grad`, the sums of x's columns [K] in x's dtype, empty unless asked for)."""
    x = rows_of(x)
    k, r = x.shape[1], h.shape[1]
    shape, dtype = (k, r) if transpose else (r, k), torch.float32 if wide else x.dtype
    grad, sums = x.new_empty(shape, dtype=dtype), x.new_empty(k if need_sums else 0)
    if grad.numel() > 0 or sums.numel() > 0:
        with launching_on(x):
            for mask in dropout.masks_of(seed):
                _launch(h, x, grad, sums, seed, mask, threshold, scale, transpose)
    return grad, sums


def _launch(h, x, grad, sums, seed, mask, threshold, scale, transpose) -> None:
    (m, k), r = x.shape, h.shape[1]
    shift = dropout.most_shift(mask)
    config = configs.of("weight_grad", r, mask, x)
    rank = rank_block(r, config)
    programs = cdiv(k + shift, config.cols) * max(cdiv(r, rank), 1)
    span, chunks = config.split(m + shift, programs, config.rows)
    scale = float(scale * (inverse_keep(threshold) if mask else 1.0))
    parts, part_sums = grad, sums
    if chunks > 1:
        parts = x.new_empty(chunks, *grad.shape, dtype=torch.float32)
        part_sums = x.new_empty(chunks, *sums.shape, dtype=torch.float32)
    weight_grad_kernel[programs, chunks](
        h, x, parts, part_sums, seed if mask else x,
        m, k, r, span, *x.stride(), *((1, r) if transpose else (k, 1)), r * k,
        threshold, scale if chunks == 1 else 1.0,
        SUMS=sums.numel() > 0, MASK=mask, PRECISION=precision(x), EXACT=r == rank,
        ROWS=config.rows, COLS=config.cols, RANK=rank,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if chunks > 1:
        reduce_parts(parts, grad, scale, seed, mask)
        reduce_parts(part_sums, sums, 1.0, seed, mask)


def one_read(dy: Tensor, r: int) -> bool:
    """Whether `down_and_weight_grad` serves dy: by shape and layout, never by what is needed."""
    if dy.numel() == 0 or r == 0:
        return False
    dy = rows_of(dy)
    if not configs.serves("down_and_weight_grad", 0, dy):
        return False
    config = configs.of("down_and_weight_grad", r, 0, dy)
    m, n = dy.shape
    return parts_are_cheap(config, m, n, r, dy.element_size())


def parts_are_cheap(config: configs.Config, m: int, n: int, r: int, element_size: int) -> bool:
    """Whether parts of dB, fp32, written and read, cost at most half of a second read of dy."""
    parts = cdiv(m, config.rows) * n * r * 4
    cheap = 2 * (2 * 4 * r) <= config.rows * element_size
    return r <= config.rank and cheap and parts <= MOST_BYTES


def down_and_weight_grad(
    h: Tensor, dy: Tensor, down: Tensor, h_scale: float, up_scale: float, wide: bool,
    need_grad: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh [M, r] = h_scale · dy · downᵀ, dB [N, r] = up_scale · dyᵀ · h, dbias [N]) of one read.

    Args:
        h: [M, r] contiguous, of dy's dtype; r as `one_read` says.
        dy: [..., N], any strides.
        down: [r, N], any strides.
        wide: whether dB is fp32.
        need_grad, need_sums: whether dB and dbias are wanted; else they are empty.
    """
    dy = rows_of(dy)
    (m, n), r = dy.shape, h.shape[1]
    config = configs.of("down_and_weight_grad", r, 0, dy)
    rank, blocks = rank_block(r, config), cdiv(m, config.rows)
    span, splits = config.split(n, blocks, config.cols)
    dh = dy.new_empty(m, r)
    grad = dy.new_empty((n, r) if need_grad else 0, dtype=torch.float32 if wide else dy.dtype)
    sums = dy.new_empty(n if need_sums else 0)
    dh_parts, grad_parts, sum_parts = (
        dy.new_empty(count, *out.shape, dtype=torch.float32)
        for count, out in ((splits, dh), (blocks, grad), (blocks, sums))
    )
    with launching_on(dy):
        down_and_weight_grad_kernel[blocks, splits](
            h, dy, down, dh_parts, grad_parts, sum_parts,
            m, n, r, span, *dy.stride(), *down.stride(), m * r,
            GRAD=need_grad, SUMS=need_sums, PRECISION=precision(dy), EXACT=r == rank,
            ROWS=config.rows, COLS=config.cols, RANK=rank,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        reduce_parts(dh_parts, dh, h_scale)
        reduce_parts(grad_parts, grad, up_scale)
        reduce_parts(sum_parts, sums, 1.0)
    return dh, grad, sums

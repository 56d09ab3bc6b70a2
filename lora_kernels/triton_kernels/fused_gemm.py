"""y [..., N] = x · weightᵀ + mask/q ∘ (scale · h · upᵀ) + bias: frozen GEMM and rank-r term.

The accumulators begin as the rank-r term, masked where it has a mask, and then take the frozen
product, so the term costs no pass over y. Serves y (up = B, bias) and dx (x = dy, weight = W₀ᵀ,
h = dh, up = Aᵀ, mask). Three kinds, by the table: `grid`, a program a tile; `persistent`, a program
for many tiles; `descriptors`, the same with x and weight loaded by TMA where it can address them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dropout import inverse_keep
from . import configs, device, dropout
from .configs import cdiv
from .device import launching_on, precision, rows_of
from .ranks import LEAST, rank_block


@triton.jit
def place_of(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles run down each column, so that L2 keeps both."""
    in_group = GROUP * col_tiles
    first = tile // in_group * GROUP
    high = tl.minimum(row_tiles - first, GROUP)
    return first + tile % in_group % high, tile % in_group // high


@triton.jit
def up_projection(
    h, up, seed, row, col, rows, cols, here, there, r, up_row, up_col, threshold, scale,
    MASK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS, COLS] = mask ∘ (scale · h · upᵀ)."""
    term = tl.zeros((ROWS, COLS), tl.float32)
    ranks, width = tl.arange(0, RANK), (RANK if EXACT else r)
    h_tile = h + rows.to(tl.int64)[:, None] * width + ranks[None, :]
    up_tile = up + cols.to(tl.int64)[None, :] * up_row + ranks.to(tl.int64)[:, None] * up_col
    if EXACT:  # one step, without a loop in the way of the frozen product's first loads
        left = tl.load(h_tile, here[:, None], other=0.0)
        right = tl.load(up_tile, there[None, :], other=0.0)
        term = tl.dot(left, right, term, input_precision=PRECISION)
    else:
        for first in range(0, r, RANK):
            inside = ranks < r - first
            left = tl.load(h_tile, here[:, None] & inside[None, :], other=0.0)
            right = tl.load(up_tile, inside[:, None] & there[None, :], other=0.0)
            term = tl.dot(left, right, term, input_precision=PRECISION)
            h_tile += RANK
            up_tile += RANK * tl.cast(up_col, tl.int64)
    term *= scale
    if MASK:
        keep = dropout.keep_tile(seed, row, col, threshold, MASK, ROWS, COLS)
        term = tl.where(keep, term, 0.0)
    return term


@triton.jit
def add_product(
    total, x, weight, rows, cols, here, there, k, x_row, x_col, weight_row, weight_col,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + x · weightᵀ of one tile, by pointers."""
    depths = tl.arange(0, DEPTH)
    x_tile = x + rows.to(tl.int64)[:, None] * x_row + depths.to(tl.int64)[None, :] * x_col
    w_tile = weight + cols.to(tl.int64)[None, :] * weight_row
    w_tile += depths.to(tl.int64)[:, None] * weight_col
    for depth in range(0, k, DEPTH):
        inside = depths < k - depth
        left = tl.load(x_tile, here[:, None] & inside[None, :], other=0.0)
        right = tl.load(w_tile, inside[:, None] & there[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_tile += DEPTH * tl.cast(x_col, tl.int64)
        w_tile += DEPTH * tl.cast(weight_col, tl.int64)
    return total


@triton.jit
def add_described_product(
    total, x, weight, row, col, k,
    K_MAJOR: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The same with tiles that TMA loads: what lies outside is zero."""
    for depth in range(0, k, DEPTH):
        left = x.load([row, depth])
        right = tl.trans(weight.load([col, depth])) if K_MAJOR else weight.load([depth, col])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["m", "threshold", "scale"])
def fused_gemm_kernel(
    x, weight, h, up, bias, y, seed,
    m, n, k, r,
    x_row, x_col, weight_row, weight_col, up_row, up_col, bias_step,  # strides
    threshold, scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, K_MAJOR: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    if not dropout.is_meant(seed, MASK):
        return
    row0, col0 = dropout.origin(seed, MASK)
    row_tiles, col_tiles = tl.cdiv(m + row0, ROWS), tl.cdiv(n + col0, COLS)
    for tile in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, row_tiles, col_tiles, GROUP)
        row, col = row_tile * ROWS, col_tile * COLS
        rows, cols = row - row0 + tl.arange(0, ROWS), col - col0 + tl.arange(0, COLS)
        here, there = dropout.within(rows, m, MASK), dropout.within(cols, n, MASK)
        total = up_projection(
            h, up, seed, row, col, rows, cols, here, there, r, up_row, up_col, threshold, scale,
            MASK, PRECISION, EXACT, ROWS, COLS, RANK,
        )  # fmt: skip
        if DESCRIPTORS:
            total = add_described_product(
                total, x, weight, row - row0, col - col0, k, K_MAJOR, PRECISION, DEPTH
            )
        else:
            total = add_product(
                total, x, weight, rows, cols, here, there, k,
                x_row, x_col, weight_row, weight_col, PRECISION, DEPTH,
            )  # fmt: skip

        if BIAS:
            added = tl.load(bias + cols.to(tl.int64) * bias_step, there, other=0.0)
            total += added.to(tl.float32)[None, :]
        place = y + rows.to(tl.int64)[:, None] * n + cols[None, :]
        tl.store(place, total.to(y.dtype.element_ty), here[:, None] & there[None, :])


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
    """y [..., N] in x's dtype, summed in fp32 and rounded once.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides.
        weight: [N, K] of x's dtype, any strides: K-major in the forward pass, its transpose for dx.
        h: [M, r] contiguous, of x's dtype.
        up: [N, r] of x's dtype, any strides.
        bias: [N] of x's dtype, or None.
        seed: of the mask on the rank-r term, int64 [2] or [4]; None: there is none.
        threshold: T of the mask (lora_kernels/dropout.py).
        scale: factor of the rank-r term; 1/q is put to it where there is a mask.

    Equivalent to::

        y = x @ weight.t() + torch.where(mask, scale / q * (h @ up.t()), 0) + bias
    """
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    x = rows_of(x)
    if y.numel() > 0:
        with launching_on(x):
            for mask in dropout.masks_of(seed):
                _launch(x, weight, h, up, bias, y, seed, mask, threshold, scale)
    return y


def _launch(x, weight, h, up, bias, y, seed, mask, threshold, scale) -> None:
    (m, k), (n, r) = x.shape, up.shape
    shift = dropout.most_shift(mask)
    config = configs.of("fused_gemm", m, mask, x, weight)
    described = config.kind == "descriptors" and shift == 0 and can_describe(x, weight)
    if config.kind == "descriptors" and not described:
        config = configs.of("fused_gemm", m, dropout.OFF_BLOCKS.value, x, weight)
    # A mask, or loads of single elements, beside more ranks at a time would spill.
    rank = LEAST if mask or r % LEAST else rank_block(r, config)
    programs = cdiv(m + shift, config.rows) * cdiv(n + shift, config.cols)
    left, right, k_major = x, weight, weight.stride(1) == 1
    if described:
        block = [config.cols, config.depth] if k_major else [config.depth, config.cols]
        left = device.descriptor(x, [config.rows, config.depth])
        right = device.descriptor(weight if k_major else weight.t(), block)
    if config.kind != "grid":
        programs = min(programs, device.multiprocessors(x.device))
    scale = float(scale * (inverse_keep(threshold) if mask else 1.0))
    fused_gemm_kernel[(programs,)](
        left, right, h, up, bias if bias is not None else x, y, seed if mask else x,
        m, n, k, r, *x.stride(), *weight.stride(), *up.stride(),
        bias.stride(0) if bias is not None else 0, threshold, scale,
        BIAS=bias is not None, MASK=mask, PRECISION=precision(x),
        DESCRIPTORS=described, K_MAJOR=k_major, EXACT=r == rank,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth,
        RANK=rank, GROUP=config.group,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def can_describe(x: Tensor, weight: Tensor) -> bool:
    """Whether TMA can load the tiles of both."""
    turned = weight if weight.stride(1) == 1 else weight.t()
    return device.has_descriptors(x.device) and device.describable(x) and device.describable(turned)

"""The dropout mask, drawn in registers: device functions, bit-identical to `dropout_mask`.

One call of Philox serves rows {g, g+8} by columns {2t, 2t+1, 2t+8, 2t+9} of a 16x16 block (the
specification is in lora_kernels/dropout.py). A tile of ROWS x COLS therefore draws on a grid of
ROWS/2 x COLS/4, and its eight bits a call are put in their places by a permutation of dimensions,
so no word is drawn twice. Tiles have to begin where 16x16 blocks of the global matrix do.

A seed of four elements says where in that matrix x lies, and only the device knows: such a call is
launched twice, for an x that begins where a block does and for one that does not, whose tiles are
shifted by `origin` and load single elements. The launch that is not meant returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROUNDS = tl.constexpr(7)
BITS = tl.constexpr((1 << 14) - 1)  # of a half word that decide

# What MASK says of a launch: no mask; of (seed, offset); of a window on blocks; of one off them.
NONE, WHOLE = tl.constexpr(0), tl.constexpr(1)
ON_BLOCKS, OFF_BLOCKS = tl.constexpr(2), tl.constexpr(3)


def masks_of(seed: Tensor | None) -> tuple[int, ...]:
    """MASK of each launch of a call."""
    if seed is None:
        return (NONE.value,)
    return (WHOLE.value,) if seed.shape[0] == 2 else (ON_BLOCKS.value, OFF_BLOCKS.value)


def most_shift(mask: int) -> int:
    """By how many rows or columns at most the tiles of a launch begin before x."""
    return 15 if mask == OFF_BLOCKS.value else 0


@triton.jit
def is_meant(seed, MASK: tl.constexpr):
    """Whether this launch is the one that serves the call."""
    meant = True
    if MASK >= ON_BLOCKS:
        off = (tl.load(seed + 2) % 16 != 0) | (tl.load(seed + 3) % 16 != 0)
        meant = off == (MASK == OFF_BLOCKS)
    return meant


@triton.jit
def origin(seed, MASK: tl.constexpr):
    """(row, column), each below 16, of x's first element in its 16x16 block of the whole."""
    row, col = 0, 0
    if MASK == OFF_BLOCKS:
        row = (tl.load(seed + 2) % 16).to(tl.int32)
        col = (tl.load(seed + 3) % 16).to(tl.int32)
    return row, col


@triton.jit
def within(places, count, MASK: tl.constexpr):
    """Which rows or columns of a tile x has; only a shifted tile begins before its first."""
    inside = places < count
    if MASK == OFF_BLOCKS:
        inside &= places >= 0
    return inside


@triton.jit
def keep_tile(
    seed, row, col, threshold, MASK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """bool [ROWS, COLS]: which elements of a tile survive.

    `row`, `col`: of the tile, multiples of 16, counted from the block that x begins in.
    """
    block_row, block_col = tl.cast(row, tl.int64) // 16, tl.cast(col, tl.int64) // 16
    if MASK >= ON_BLOCKS:
        block_row += tl.load(seed + 2) // 16
        block_col += tl.load(seed + 3) // 16
    row_group = (block_row * 8).to(tl.uint32) + tl.arange(0, ROWS // 2).to(tl.uint32)
    col_group = (block_col * 4).to(tl.uint32) + tl.arange(0, COLS // 4).to(tl.uint32)
    row_group = row_group[:, None] + tl.zeros((1, COLS // 4), tl.uint32)
    col_group = col_group[None, :] + tl.zeros((ROWS // 2, 1), tl.uint32)
    offset = tl.load(seed + 1)
    low = (offset & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(row_group)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(row_group)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed), col_group, row_group, low, high, n_rounds=ROUNDS
    )

    # [.., .., lower rows, right columns, odd column]: the bits of one call
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = tl.permute(words, (0, 1, 3, 2))
    bits = tl.join(words & BITS, (words >> 16) & BITS)
    keep = bits.to(tl.int32) >= threshold
    keep = tl.reshape(keep, (ROWS // 16, 8, COLS // 16, 4, 2, 2, 2))
    keep = tl.permute(keep, (0, 4, 1, 2, 5, 3, 6))
    return tl.reshape(keep, (ROWS, COLS))

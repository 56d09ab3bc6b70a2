"""Blocks of ranks: what a kernel takes of r at a time, and where that needs no mask.

tl.dot multiplies powers of two. A rank that is one itself, EXACT, makes its loads whole vectors of
a known stride; any other is masked, and one that 16 does not divide is loaded element by element,
so its blocks are small. Blocks of ranks lie side by side in the grid: they share x in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import Config

LEAST = 16  # of a product's depth in tl.dot
ODD = 32  # of a rank that 16 does not divide


@triton.jit
def ranks_of(program, r, EXACT: tl.constexpr, RANK: tl.constexpr):
    """(the other block, ranks) of a program."""
    ranks = tl.arange(0, RANK)
    if not EXACT:
        blocks = tl.maximum(tl.cdiv(r, RANK), 1)
        ranks += program % blocks * RANK
        program = program // blocks
    return program, ranks


@triton.jit
def known(mask, ranks, r, EXACT: tl.constexpr):
    """The mask [.., 1] of a tile whose columns are ranks."""
    if not EXACT:
        mask = mask & (ranks < r)[None, :]
    return mask


def rank_block(r: int, config: Config) -> int:
    """Of how many ranks a program, or a step of fused_gemm, takes: a power of two."""
    most = config.rank if r % LEAST == 0 else min(config.rank, ODD)
    return min(max(1 << max(r - 1, 0).bit_length(), LEAST), most)

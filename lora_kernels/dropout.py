"""The dropout mask: a pure function of (seed, row, column), the same bits in every backend.

Specification
-------------
x [M, K] (leading dimensions flattened) is a window of a global matrix; its element (i, j) lies at
row R = row0 + i, column C = col0 + j. The seed tensor is int64 [2] = (seed, offset), which means
row0 = col0 = 0, or int64 [4] = (seed, offset, row0, col0), with 0 <= R < 2**33, 0 <= C < 2**34.

1. Philox4x32 with 7 rounds, key = (low, high word of seed), counter = (column group, row group,
   low, high word of offset), where

       row group    = R // 16 * 8 + R % 8
       column group = C // 16 * 4 + C % 8 // 2

   One call serves 8 elements: rows {g, g+8} by columns {2t, 2t+1, 2t+8, 2t+9} of a 16x16 block.
   That is what lane 4g+t of a warp holds of a tensor-core fragment (A operand of mma.sync and
   wgmma, and two n8 blocks of an accumulator), so kernels of any tile shape draw the mask in
   registers.
2. Element (R, C) takes 14 bits: word v = R // 8 % 2 + 2 * (C // 8 % 2), its low half for even C and
   its high half for odd C, the low 14 bits of that half.
3. It is kept iff those bits >= T, where T = round(p * 16384), halves to even.

So the mask keeps an element with probability exactly q = 1 - T / 16384 (`keep_probability`), and
survivors are scaled by 1/q, not by 1/(1-p). |q - (1-p)| <= 2**-15. A p > 0 for which T = 0 (p at
most 2**-15) drops nothing, q = 1, and draws nothing; a p for which T = 16384 (p at least 1 -
2**-15) drops everything, q = 0: the LoRA term and its gradients are exactly zero.

Sources: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), where 7
rounds are the fewest that pass BigCrush; fragment layouts, PTX ISA, matrix fragments for
mma.m16n8k16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._ops import ops as OPS

RANGE = 1 << 14
_WORD = 0xFFFFFFFF
_REALS: Any = (Real, torch.SymFloat)
_INTEGERS: Any = (int, torch.SymInt)


def drop_threshold(p: float) -> int:
    """T of the specification: the number of the 16384 bit patterns that drop an element."""
    return round(p * RANGE)


def drops(p: float) -> bool:
    """Whether the mask for `p` drops anything at all: T > 0, without the rounding."""
    return p > 0.5 / RANGE


def keep_probability(p: float) -> float:
    """q, the exact probability with which the mask for `p` keeps an element.

    Args:
        p: drop probability, in [0, 1].

    Raises:
        TypeError: p is no number. ValueError: it is not in [0, 1].

    Equivalent to::

        1 - round(p * 16384) / 16384
    """
    check_probability(p, "keep_probability")
    return 1 - drop_threshold(p) / RANGE


def inverse_keep(threshold: int) -> float:
    """1/q of the mask with this T, by which survivors are multiplied."""
    # Nothing survives q = 0, so its inverse multiplies nothing.
    return RANGE / max(RANGE - threshold, 1)


def check_probability(p: float, op: str, name: str = "p") -> None:
    if isinstance(p, bool) or not isinstance(p, _REALS):
        raise TypeError(f"{op}: {name} must be a number, but got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:  # NaN fails the comparison too
        raise ValueError(f"{op}: dropout probability has to be between 0 and 1, but got {p}")


def draw_seed(device: torch.device) -> Tensor:
    """(seed, offset) from torch's default generator of `device`: one small launch, no host sync.

    Being an ordinary draw, it obeys torch.manual_seed, is replayed by activation checkpointing, and
    advances with every replay of a CUDA graph.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def dropout_mask(
    seed: Tensor | Sequence[int], shape: Sequence[int], p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The keep mask that `fused_lora_linear` uses for an x of this shape, seed and p.

    Args:
        seed: int64 [2] = (seed, offset) or [4] = (seed, offset, row0, col0), or a sequence of ints.
        shape: shape of x, [..., K]; the leading dimensions count as rows.
        p: drop probability, in [0, 1].
        device: where the mask is made; the seed is moved there.

    Returns:
        bool tensor of `shape`, True where an element is kept. Bit-identical on every backend.

    Raises:
        TypeError: p is no number, or seed or shape no sequence of integers.
        ValueError: p outside [0, 1], an empty shape, or a malformed seed.

    Equivalent to (see the module docstring for `philox` and the two groups)::

        bits = philox(seed, offset, row_group, column_group)[word] >> (16 * (column % 2)) & 0x3fff
        mask = bits >= round(p * 16384)
    """
    check_probability(p, "dropout_mask")
    _check_integers(shape, "shape")
    if len(shape) == 0 or min(shape) < 0:
        raise ValueError(
            f"dropout_mask: shape must have one dimension or more, none negative, but got {shape}"
        )
    if not isinstance(seed, Tensor):
        _check_integers(seed, "seed")
        if not all(-(2**63) <= word < 2**63 for word in seed):
            raise ValueError(f"dropout_mask: seed must hold 64-bit integers, but got {seed!r}")
        seed = torch.tensor(list(seed), dtype=torch.int64, device=device)
    check_seed(seed, "dropout_mask")
    seed = seed.to(device).contiguous()
    rows, cols = math.prod(shape[:-1]), shape[-1]
    mask = OPS.dropout_mask(seed, rows, cols, drop_threshold(p))
    return mask.view(tuple(shape))


def _check_integers(given: Any, name: str) -> None:
    if not isinstance(given, Sequence) or not all(isinstance(n, _INTEGERS) for n in given):
        raise TypeError(f"dropout_mask: {name} must be a sequence of integers, but got {given!r}")


def check_seed(seed: Tensor, op: str) -> None:
    if seed.dtype != torch.int64 or seed.dim() != 1 or seed.shape[0] not in (2, 4):
        raise ValueError(
            f"{op}: seed must be an int64 tensor [2] = (seed, offset) or [4] = (seed, offset, "
            f"row0, col0), but got {seed.dtype} {list(seed.shape)}"
        )


def reference_mask(seed: Tensor, rows: int, cols: int, threshold: int) -> Tensor:
    """`dropout_mask` in plain PyTorch, for any device: the specification, step by step."""
    row0, col0 = (seed[2], seed[3]) if seed.shape[0] == 4 else (0, 0)
    row = torch.arange(rows, device=seed.device)[:, None] + row0
    col = torch.arange(cols, device=seed.device)[None, :] + col0
    row_group = row // 16 * 8 + row % 8
    col_group = col // 16 * 4 + col % 8 // 2
    words = _philox(col_group, row_group, seed[1], seed[0])

    upper, right = row // 8 % 2 == 0, col // 8 % 2 == 1
    word = torch.where(
        right, torch.where(upper, words[2], words[3]), torch.where(upper, words[0], words[1])
    )
    bits = (word >> (16 * (col % 2))) & (RANGE - 1)
    return bits >= threshold


def _philox(c0: Tensor, c1: Tensor, offset: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-7 on int64 tensors that hold 32-bit words."""
    c0, c1 = torch.broadcast_tensors(c0 & _WORD, c1 & _WORD)
    c2, c3 = offset & _WORD, (offset >> 32) & _WORD
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(7):
        # int64 products wrap, which leaves both 32-bit halves of the 64-bit product intact
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = (p1 >> 32) & _WORD ^ c1 ^ k0, (p0 >> 32) & _WORD ^ c3 ^ k1
        c1, c3 = p1 & _WORD, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3

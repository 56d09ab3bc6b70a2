"""out = scale · Σ parts[s], summed in the order of s: what makes split sums the same every time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from .configs import cdiv

ELEMENTS = 1024  # a program
WARPS = 4


@triton.jit(do_not_specialize=["count", "scale"])
def reduce_kernel(
    parts, out, seed, count, elements, scale, MASK: tl.constexpr, ELEMENTS: tl.constexpr
):
    if not dropout.is_meant(seed, MASK):
        return
    places = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = places < elements
    part = parts + places
    total = tl.zeros((ELEMENTS,), tl.float32)
    for _ in range(count):
        total += tl.load(part, inside, other=0.0)
        part += elements
    tl.store(out + places, (total * scale).to(out.dtype.element_ty), inside)


def reduce_parts(
    parts: Tensor, out: Tensor, scale: float, seed: Tensor | None = None, mask: int = 0
) -> Tensor:
    """`out`, filled from contiguous fp32 `parts` [S, *out.shape]; rounded once, to its dtype.

    `seed` and `mask`: of the launch that made the parts.
    """
    elements = out.numel()
    if elements == 0:
        return out
    reduce_kernel[(cdiv(elements, ELEMENTS),)](
        parts, out, parts if seed is None else seed, parts.shape[0], elements, float(scale),
        MASK=mask, ELEMENTS=ELEMENTS, num_warps=WARPS,
    )  # fmt: skip
    return out

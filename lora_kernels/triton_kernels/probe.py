"""Whether tl.dot multiplies bfloat16 here: Triton's interpreter multiplies the bits instead."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(x, y):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tile = tl.load(x + place)
    tl.store(y + place, tl.dot(tile, tile))


def product_is_right() -> bool:
    x = torch.full((16, 16), 1.5, dtype=torch.bfloat16)
    y = torch.empty(16, 16)
    product_kernel[(1,)](x, y)
    return bool((y == 36.0).all())

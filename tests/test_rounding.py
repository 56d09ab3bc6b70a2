"""How often what lies between the operands and a result is rounded: by data that tells once from
twice."""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk

NEXT = 2.0**-7  # from 1 to the next bfloat16


def bf16(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bfloat16)


def step(backend, x, weight, a, b, bias, dy, scaling):
    """y and the gradients of x, A and B."""
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    y = lk.fused_lora_linear(x, weight, a, b, bias, scaling=scaling, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)


def test_h_and_dh_are_scaled_before_they_are_rounded(backend):
    """1.5 (1 + 2^-8) becomes 1.5 + 2^-7, or 1.5 if the sum was rounded first.

    Autograd of the reference rounds dh first, which is once too.
    """
    x, dy, weight = bf16([1, NEXT / 2]), bf16([1, NEXT / 2]), torch.zeros(2, 2).bfloat16()
    bias = bf16([-1.5, -1.5])[0]
    y, dx, da, db = step(backend, x, weight, bf16([1, 1]), bf16([1], [1]), bias, dy, 1.5)
    once = 1.5 + NEXT
    assert torch.equal(y, bf16([NEXT, NEXT])), "y takes h as it was rounded"
    assert torch.equal(db, bf16([once], [once * NEXT / 2]))
    if backend != "reference":
        assert torch.equal(dx, bf16([once, once]))
        assert torch.equal(da, bf16([once, once * NEXT / 2]))


def test_the_frozen_product_is_not_rounded_before_the_term_is_added(backend, eager_like):
    """256 + 1 is no bfloat16; less 256 it is 1."""
    if eager_like:
        pytest.skip("rounds it, as eager PyTorch does")
    ones, weight = bf16([1, 1]), bf16([256, 1], [1, 0])
    y, dx, _, _ = step(backend, ones, weight, bf16([-256, 0]), bf16([1], [0]), None, ones + 0, 1.0)
    assert torch.equal(y, ones) and torch.equal(dx, ones)

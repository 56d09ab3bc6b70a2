"""Faults 22 to 25 of docs/reliability.md: what NaN, Inf, overflow and subnormals do."""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import tolerance
import torch
from conftest import OPERATORS

import lora_kernels as lk
from lora_kernels.criterion import oracle

SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEED = torch.tensor([1, 2])


def kinds(t: torch.Tensor) -> torch.Tensor:
    """0 of a finite element; NaN, Inf and -Inf have each their number."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


# ---- 22: NaN and Inf -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias", "dy"])
def test_fault_22_nan_and_inf_spread_as_in_the_definition(backend, name, value):
    problem = problems.make((40, 30, 48, 8))
    operand = getattr(problem, name).clone()
    operand.view(-1)[operand.numel() // 3] = value
    problem = replace(problem, **{name: operand})
    got, want = problem.run(backend), problem.run("reference")
    assert any(kinds(t).any() for t in want.values())
    for result in want:
        assert torch.equal(kinds(got[result]), kinds(want[result])), result


@pytest.mark.parametrize("shape", [(40, 30, 48, 8), (130, 72, 90, 16)], ids=["small", "large"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_fault_22_a_bad_value_stays_in_its_row(backend, value, shape):
    """A bad row of x in y, and one of dy in dx: no other row changes a bit."""
    problem = problems.make(shape, dropout_p=0.3)
    clean = problem.run(backend)
    others = torch.arange(shape[0]) != 17
    for name, result in (("x", "y"), ("dy", "x")):
        operand = getattr(problem, name).clone()
        operand[17, 5] = value
        got = replace(problem, **{name: operand}).run(backend)[result]
        assert torch.equal(got[others], clean[result][others])
        assert not got[17].isfinite().any()


# ---- 23: under dropped elements ------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_fault_23_a_bad_value_under_a_dropped_element_vanishes(backend, value):
    """With W = 0 only the dropped copy of x is read; 0 * Inf would be NaN. So too for dA."""
    mask = lk.dropout_mask(SEED, (40, 48), 0.5)
    x, a, b = torch.randn(40, 48), torch.randn(8, 48), torch.randn(30, 8)
    x[~mask] = value
    x.requires_grad_()
    a.requires_grad_()
    kernels = torch.ops.lora_kernels
    h = kernels.down_proj(x.detach(), a.detach(), SEED, 8192, 1.0)
    grad = kernels.weight_grad(h, x.detach(), SEED, 8192, 1.0, False, False)
    assert h.isfinite().all() and grad.isfinite().all()
    weight = torch.zeros(30, 48)
    b.requires_grad_()
    y = lk.fused_lora_linear(x, weight, a, b, dropout_p=0.5, seed=SEED, backend=backend)
    da, db = torch.autograd.grad(y, (a, b), torch.randn(40, 30))
    assert da.isfinite().all() and db.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fault_23_a_bad_value_of_a_vanishes_where_dx_is_dropped(backend, value):
    p, column = 0.5, 17
    mask = lk.dropout_mask(SEED, (40, 48), p)[:, column]
    x, a = torch.randn(40, 48, requires_grad=True), torch.randn(8, 48)
    a[3, column] = value
    y = lk.fused_lora_linear(
        x, torch.randn(30, 48), a, torch.randn(30, 8), dropout_p=p, seed=SEED, backend=backend
    )
    dx = torch.autograd.grad(y, x, torch.randn(40, 30))[0][:, column]
    assert dx[~mask].isfinite().all() and not dx[mask].isfinite().any()


# ---- 24: overflow of fp16 ------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["base", "lora"])
def test_fault_24_what_fp16_cannot_hold_is_infinite(backend, term):
    """Neither clamped nor NaN, and nothing else is infinite; h holds what y does not."""
    scales = dict(b_scale=0.0) if term == "base" else dict(w_scale=0.0, b_scale=2.0**15)
    problem = problems.make((60, 40, 64, 8), torch.float16, bias=False, **scales)
    if term == "base":
        problem = replace(problem, x=problem.x * 2.0**12, weight=problem.weight * 8)
    exact = oracle(problem).value["y"]
    y = lk.fused_lora_linear(
        problem.x, problem.weight, problem.lora_a, problem.lora_b, scaling=problem.scaling,
        backend=backend,
    )  # fmt: skip
    sure = (exact.abs() - 65520).abs() > 65520 * 2.0**-9  # whatever h's rounding does
    over = exact.abs() > 65520
    assert over[sure].any() and not over[sure].all()
    assert torch.equal(y.isinf()[sure], over[sure]) and not y.isnan().any()
    assert torch.equal(y[sure & over].sign().double(), exact[sure & over].sign())


@pytest.mark.parametrize("operator", OPERATORS)  # the definition scales before it rounds
def test_fault_24_h_does_not_overflow_where_eager_does_not(operator):
    """s = 64 with x·Aᵀ near 60000 / 8: h scaled by s would be infinite, y is not."""
    x = torch.full((4, 64), 8.0, dtype=torch.float16)
    a = torch.full((2, 64), 14.0, dtype=torch.float16)
    b = torch.full((3, 2), 2.0**-7, dtype=torch.float16)
    w = torch.zeros(3, 64, dtype=torch.float16)
    y = lk.fused_lora_linear(x, w, a, b, scaling=64.0, backend=operator)
    assert y.isfinite().all() and abs(y[0, 0].item() - 7168.0) <= 4


def test_fault_24_fp32_gradients_of_fp16_operands_do_not_overflow(backend):
    x = torch.full((4096, 64), 4.0, dtype=torch.float16)
    a, b = torch.full((2, 64), 0.01).requires_grad_(), torch.full((8, 2), 0.5)
    y = lk.fused_lora_linear(x, torch.zeros(8, 64).half(), a, b, backend=backend)
    da = torch.autograd.grad(y, a, torch.full_like(y, 4.0))[0]
    assert da.dtype == torch.float32 and (da == 4096 * 4 * 16).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_fault_24_dh_does_not_overflow_where_dy_b_does_not(operator):
    """The same of dh: s = 64 with dy·B = 7168."""
    x = torch.zeros(4, 64, dtype=torch.float16, requires_grad=True)
    a = torch.full((2, 64), 2.0**-7, dtype=torch.float16)
    b = torch.full((64, 2), 14.0, dtype=torch.float16)
    y = lk.fused_lora_linear(x, torch.zeros(64, 64).half(), a, b, scaling=64.0, backend=operator)
    dx = torch.autograd.grad(y, x, torch.full_like(y, 8.0))[0]
    assert dx.isfinite().all() and abs(dx[0, 0].item() - 7168.0) <= 4


# ---- 25: subnormals ------------------------------------------------------------------------------


# By what x, or dy, is scaled: every product is exact, and most results lie below the least normal.
SUBNORMAL = {torch.float16: 2.0**-20, torch.bfloat16: 2.0**-130}


@pytest.mark.parametrize("operand, result", [("x", "y"), ("dy", "x")])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT.values(), ids=SIXTEEN_BIT)
def test_fault_25_subnormals_are_not_flushed(backend, dtype, operand, result):
    problem = problems.make_exact((33, 40, 48, 8), dtype, seed=3)
    small = (getattr(problem, operand).double() * SUBNORMAL[dtype]).to(dtype)
    problem = replace(problem, **{operand: small}, bias=None)
    got = problem.run(backend)
    if backend == "composed":  # the vendor's GEMMs: oneDNN's of bf16 flush
        assert torch.equal(got[result], problem.eager()[result])
        return
    below = got[result].double().abs() < torch.finfo(dtype).tiny
    assert (below & (got[result] != 0)).sum() > 100
    tolerance.assert_c4(problem, got)

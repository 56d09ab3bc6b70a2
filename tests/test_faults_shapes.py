"""Faults 12 to 21 of docs/reliability.md: every shape, layout and size is right or refused.

Those of one kernel are in the tests of that kernel.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import problems
import pytest
import tolerance
import torch
from conftest import OPERATORS, USABLE
from test_ops import OPS, SEED, operands
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels import dropout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 128, 256)
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@pytest.mark.parametrize("r", RANKS)
def test_fault_12_every_rank(backend, eager_like, r):
    problem = problems.make((20, 24, 28, r), torch.bfloat16, dropout_p=0.2)
    tolerance.assert_c1(problem, problem.run(backend), eager_like=eager_like)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("empty", ["M", "N", "K", "r", "MK"])
def test_fault_13_zero_sizes(backend, eager_like, dtype, empty):
    m, n, k, r = (0 if d in empty else size for d, size in zip("MNKr", (4, 6, 5, 3), strict=True))
    problem = problems.make((m, n, k, r), dtype, dropout_p=0.3)
    got = problem.run(backend)
    assert got["y"].shape == (m, n) and got["x"].shape == (m, k)
    assert got["lora_a"].shape == (r, k) and got["lora_b"].shape == (n, r)
    tolerance.assert_c1(problem, got, eager_like=eager_like)


@pytest.mark.parametrize("dim", ["M", "N", "K"])
@pytest.mark.parametrize("size", SIZES)
def test_fault_14_every_edge_of_a_tile(backend, eager_like, dim, size):
    m, n, k = (size if d == dim else rest for d, rest in zip("MNK", (18, 22, 26), strict=True))
    problem = problems.make((m, n, k, 5), torch.bfloat16, dropout_p=0.2)
    tolerance.assert_c1(problem, problem.run(backend), eager_like=eager_like)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 4), (1, 1, 1, 3)], ids=str)
def test_fault_15_any_number_of_leading_dimensions(backend, eager_like, lead):
    m = torch.Size(lead).numel()
    problem = problems.make((m, 12, 20, 4), lead=lead, dropout_p=0.3)
    got = problem.run(backend)
    assert got["y"].shape == (*lead, 12) and got["x"].shape == (*lead, 20)
    tolerance.assert_c1(problem, got, eager_like=eager_like)


def test_fault_15_x_without_dimensions():
    weight, a, b = torch.ones(6, 8), torch.ones(3, 8), torch.ones(6, 3)
    with pytest.raises(ValueError, match="x must have at least one dimension, but got a 0-d"):
        lk.fused_lora_linear(torch.tensor(1.0), weight, a, b)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ["2d", "3d"])
def test_fault_15_expanded_x_and_dy(backend, eager_like, dtype, shape):
    lead = (6, 9) if shape == "3d" else (54,)
    problem = problems.make((54, 14, 18, 5), dtype, lead=lead, dropout_p=0.2)
    x = problem.x[:1].expand(problem.x.shape)  # stride 0 along a leading dimension
    dy = problem.dy.flatten()[0].expand(problem.dy.shape)  # what sum().backward() sends
    problem = replace(problem, x=x, dy=dy)
    tolerance.assert_c1(problem, problem.run(backend, x=x), eager_like=eager_like)


def as_they_lie(problem: problems.Problem, backend: str) -> dict[str, torch.Tensor]:
    """`run` without the copies that would make operands dense."""
    leaves = [t.detach().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
    y = lk.fused_lora_linear(
        leaves[0], problem.weight, *leaves[1:], scaling=problem.scaling,
        dropout_p=problem.dropout_p, seed=problem.seed, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, problem.dy)
    return {"y": y.detach()} | dict(zip(problems.GRADS, grads, strict=False))


OPERANDS = ("x", "weight", "lora_a", "lora_b", "dy")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(34, 28, 36, 6), (130, 72, 96, 16)], ids=["small", "large"])
def test_fault_16_memory_that_is_not_aligned(backend, eager_like, shape, dtype):
    """Every address that an element may have, but multiples of 16 bytes."""

    def moved(t: torch.Tensor, offset: int) -> torch.Tensor:
        flat = torch.full((16 + offset + t.numel(),), torch.nan, dtype=t.dtype)
        begin = -flat.data_ptr() % 16 // dtype.itemsize + offset
        flat[begin : begin + t.numel()] = t.flatten()
        return flat[begin : begin + t.numel()].view(t.shape)

    problem = problems.make(shape, dtype, dropout_p=0.2, bias=False)
    for offset in range(1, 16 // dtype.itemsize):
        off = replace(problem, **{name: moved(getattr(problem, name), offset) for name in OPERANDS})
        assert off.weight.data_ptr() % 16 == offset * dtype.itemsize
        tolerance.assert_c1(problem, as_they_lie(off, backend), eager_like=eager_like)


# ---- upstream gradients --------------------------------------------------------------------------


def test_fault_18_slices_of_a_fused_projection(backend):
    """q, k and v as slices of one weight, their outputs concatenated: offsets on both sides."""
    g = torch.Generator().manual_seed(0)
    x, fused = (torch.randn(128, 128, generator=g) for _ in range(2))
    weights = fused.repeat(3, 1).split(128)
    a, b = torch.randn(8, 128, generator=g) / 11, torch.randn(128, 8, generator=g)

    def grads(name):
        leaf = x.clone().requires_grad_()
        ys = [lk.fused_lora_linear(leaf, w, a, b, backend=name) for w in weights]
        return torch.autograd.grad(torch.cat(ys, -1).square().sum(), leaf)[0]

    torch.testing.assert_close(grads(backend), grads("reference"), rtol=1e-4, atol=1e-2)


class Undefined(torch.autograd.Function):
    """Has no gradient to give."""

    @staticmethod
    def forward(ctx, *tensors):
        return sum(t.sum() for t in tensors)

    @staticmethod
    def backward(ctx, dy):
        return (None,) * len(ctx.needs_input_grad)


@pytest.mark.parametrize(
    "way, name", [("eager", n) for n in USABLE] + [("operator", n) for n in OPERATORS]
)
def test_fault_18_a_gradient_that_is_undefined(way, name):
    x, w, a, b, bias, _ = operands()
    if way == "eager":
        y = lk.fused_lora_linear(x, w, a, b, bias, backend=name)
    else:
        y = OPS.lora_linear(x, w, a, b, bias, None, 1.0, 0.0, name)[0]
    grads = torch.autograd.grad(Undefined.apply(y), (x, a, b, bias), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


def test_fault_18_a_gradient_of_another_dtype(backend):
    x, w, a, b, bias, dy = operands(torch.bfloat16)
    y = lk.fused_lora_linear(x, w, a, b, bias, backend=backend)
    wide, same = (
        torch.autograd.grad(y, (x, a, b, bias), g, retain_graph=True) for g in (dy.float(), dy)
    )
    assert all(map(torch.equal, wide, same))


# ---- what is not asked for -----------------------------------------------------------------------

SUBSETS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(
    "needs", SUBSETS, ids=["".join("xabB"[i] for i in range(4) if s[i]) or "none" for s in SUBSETS]
)
def test_fault_19_requires_grad_subsets(backend, needs):
    problem = problems.make((21, 18, 26, 4), torch.float32, dropout_p=0.2)
    full = problem.run(backend)
    leaves = [
        t.detach().clone().requires_grad_(need)
        for t, need in zip(
            (problem.x, problem.lora_a, problem.lora_b, problem.bias), needs, strict=True
        )
    ]
    y = lk.fused_lora_linear(
        leaves[0], problem.weight, *leaves[1:], scaling=problem.scaling, dropout_p=0.2,
        seed=problem.seed, backend=backend,
    )  # fmt: skip
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(problem.dy)
    for name, leaf, need in zip(problems.GRADS, leaves, needs, strict=True):
        assert (leaf.grad is None) != need
        if need:
            assert torch.equal(leaf.grad, full[name]), f"{name} depends on what else is asked for"


@pytest.mark.parametrize("trained", [0, 1])
def test_the_operator_of_a_group_keeps_x_for_any_lora_a(trained):
    """Backward reads x for dA alone, and gets none where no lora_a requires grad."""
    parts = [problems.make((9, 12, 14, 3), generator_seed=i) for i in range(2)]
    weights, lora_as, lora_bs = (
        [getattr(p, n) for p in parts] for n in ("weight", "lora_a", "lora_b")
    )
    lora_as[trained].requires_grad_()
    x, no_bias = parts[0].x, [torch.empty(0)] * 2
    ys, _ = OPS.lora_linear_group(
        x, weights, lora_as, lora_bs, no_bias, [], [1.7] * 2, 0.0, "composed"
    )
    (got,) = torch.autograd.grad(ys[trained], lora_as[trained], parts[trained].dy)
    alone = replace(parts[trained], x=x, bias=None)
    assert torch.equal(got, alone.run("composed")["lora_a"])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_fault_19_unneeded_gradients_take_no_memory(operator, needs):
    x, w, a, b, bias, dy = (t.detach() for t in operands())
    h = torch.ones(15, 4)
    for scaling in (0.5, 0.0):  # 0: the adapter is off
        grads = OPS.lora_linear_backward(dy, x, w, a, b, h, SEED, scaling, 0.2, operator, *needs)
        for grad, like, need in zip(grads, (x, a, b, bias), needs, strict=True):
            assert grad.untyped_storage().nbytes() == (like.nbytes if need else 0)


class Products(TorchDispatchMode):
    """Counts the matrix products that are run within."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return op(*args, **(kwargs or {}))


# Of x, A, B and the bias (B) what is wanted, and its products: dh for x and A, two for dx.
WANTED = {"x": 1 + 2, "a": 1 + 1, "b": 1, "xa": 1 + 2 + 1, "B": 0, "xabB": 1 + 2 + 1 + 1}


@pytest.mark.parametrize("wanted, products", WANTED.items(), ids=WANTED)
def test_fault_19_unneeded_gradients_are_not_computed(wanted, products):
    x, w, a, b, bias, dy = operands(grad=False)
    for leaf, name in ((x, "x"), (a, "a"), (b, "b"), (bias, "B")):
        leaf.requires_grad_(name in wanted)
    y = lk.fused_lora_linear(x, w, a, b, bias, backend="composed")
    with Products() as found:
        y.backward(dy)
    assert found.count == products


# ---- offsets past 2^31 ---------------------------------------------------------------------------


def far(t: torch.Tensor, row: int, column: int = 1) -> torch.Tensor:
    """The same values `row` and `column` elements apart; the gaps take no memory."""
    rows, columns = t.shape
    gaps = np.zeros((rows - 1) * row + (columns - 1) * column + 1, np.uint16)
    return torch.from_numpy(gaps).view(t.dtype).as_strided(t.shape, (row, column)).copy_(t)


# The last row, or column, begins 2^31 - 1 or 2^31 elements behind the first, or a little later.
APART = {
    "below": dict(row=2**31 - 1),
    "at": dict(row=2**31),
    "past": dict(row=2**31 + 7),
    "columns": dict(row=1, column=2**31 + 5),
}


@pytest.mark.parametrize("apart", APART.values(), ids=APART)
@pytest.mark.parametrize("operand", OPERANDS)
def test_fault_20_offsets_past_2_31_elements(backend, eager_like, operand, apart):
    """Two rows, or two columns, so that their distance alone makes the offset."""
    at = {"x": (0, 2), "weight": (1, 2), "lora_a": (3, 2), "lora_b": (1, 3), "dy": (0, 1)}[operand]
    shape = [9, 10, 11, 5]
    shape[at["column" in apart]] = 2
    p = problems.make(tuple(shape), torch.bfloat16, dropout_p=0.2, bias=False)
    moved = replace(p, **{operand: far(getattr(p, operand), **apart)})
    tolerance.assert_c1(p, as_they_lie(moved, backend), eager_like=eager_like)


@pytest.mark.parametrize("origin", [2**31 - 9, 2**32 - 9], ids=["2_31", "2_32"])
def test_fault_20_rows_and_columns_of_the_mask_past_2_31(backend, eager_like, origin):
    """The counters go on past both limits, as the specification's do."""
    p = problems.sharded(problems.make((20, 18, 40, 4), dropout_p=0.4), origin, origin)
    mask = dropout.reference_mask(p.seed, 20, 40, dropout.drop_threshold(0.4))
    assert torch.equal(lk.dropout_mask(p.seed, (20, 40), 0.4), mask)
    tolerance.assert_c1(p, p.run(backend), eager_like=eager_like)


@pytest.mark.slow  # seconds of the C++ kernels on one core
def test_fault_20_more_than_2_31_elements():
    """x is one row repeated: of all its rows the last ones are those of a window of the mask."""
    rows, k = (1 << 19) + 40, 4096
    row, a = torch.randn(1, k), torch.randn(1, k)
    h = OPS.down_proj(row.expand(rows, k), a, torch.tensor([1, 2]), 1638, 1.0)
    window = torch.tensor([1, 2, rows - 48, 0])
    last = row.expand(48, k)
    assert torch.equal(h[-48:], OPS.down_proj(last, a, window, 1638, 1.0))
    only_last = torch.zeros(rows, 1)
    only_last[-48:] = h[-48:]
    grad = OPS.weight_grad(only_last, row.expand(rows, k), torch.tensor([1, 2]), 1638, 1.0, 0, 0)
    want = OPS.weight_grad(h[-48:], last, window, 1638, 1.0, False, False)
    torch.testing.assert_close(grad, want)

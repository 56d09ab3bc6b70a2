"""Direct calls of the C++ operators for CPUs: what the public calls never ask of them."""

from __future__ import annotations

import threading

import problems
import pytest
import torch
from torch import Tensor

from lora_kernels.dropout import RANGE
from lora_kernels.schemas import OPS, has_kernel

pytestmark = pytest.mark.skipif(not has_kernel("forward", "CPU"), reason="no C++ library")
SEED = torch.tensor([1, 2])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- what is refused -----------------------------------------------------------------------------


def gemm(x: Tensor, **changed: Tensor | None) -> Tensor:
    """fused_gemm of square operands but for those that are given."""
    operands = dict(x=x, weight=x, h=x, up=x, bias=None, seed=None) | changed
    return OPS.fused_gemm(*operands.values(), 0, 1.0)


def group(x: Tensor, threshold: int = 0, **changed: list) -> object:
    """backward_group of two projections, square but for what is given."""
    lists = dict(dys=[x] * 2, weights=[x] * 2, lora_as=[x] * 2, lora_bs=[x] * 2, hs=[x] * 2)
    lists |= dict(seeds=[None] * 2) | changed
    flags = [[True] * 2] * 3
    return OPS.backward_group(
        x, *lists.values(), threshold, [1.0] * 2, [1.0] * 2, *[[False] * 2] * 2, True, *flags
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: gemm(x, weight=x[:, :3]), r"weight.size\(1\) is 3 but must be 4"),
        (lambda x: gemm(x, up=x[:3]), r"fused_gemm: up.size\(0\) is 3 but must be 4"),
        (lambda x: gemm(x, h=x.half()), "h has dtype float16 but must have that of x, float32"),
        (lambda x: gemm(x, up=x.half()), "up has dtype float16 but must have that of x, float32"),
        (lambda x: gemm(x, bias=x), "bias must have one dimension, but has 2"),
        (lambda x: gemm(x, bias=x[0].half()), "bias has dtype float16 but must have that of x"),
        (lambda x: gemm(x, bias=x[0].int()), "bias must be float32, bfloat16 or float16"),
        (lambda x: gemm(x[0, 0], weight=x, h=x, up=x), "x must have at least one dimension"),
        (lambda x: OPS.down_proj(x, x, SEED, RANGE + 1, 1.0), "threshold must be in 0..16384"),
        (lambda x: OPS.down_proj(x, x, torch.arange(4)[::2], 1, 1.0), "seed must be a contiguous"),
        (lambda x: OPS.down_proj(x, x, torch.arange(5), 1, 1.0), "seed must be a contiguous"),
        (lambda x: OPS.down_proj(x, x, SEED[None], 1, 1.0), "seed must be a contiguous"),
        (lambda x: OPS.down_proj(x, x, SEED.int(), 1, 1.0), "seed must be a contiguous int64"),
        (lambda x: OPS.dropout_mask(SEED, 4, -1, 0), "must not be negative"),
        (lambda x: group(x, weights=[x, x[:, :3]], lora_as=[x, x[:, :3]]), "size"),
        (lambda x: group(x, dys=[x, x[:3]], hs=[x, x[:3]]), "size|rows"),
        (lambda x: group(x, dys=[x, x.half()]), "dtype"),
        (lambda x: group(x, seeds=[None]), "every list must have one entry a projection"),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(4, 4))


def test_a_projection_of_another_x_is_refused_for_dx_alone():
    """Without gradients of A nothing else reads x, or asks how wide it is."""
    x, narrow, low = (torch.randn(s) for s in [(4, 4), (4, 3), (3, 4)])
    none = [[False] * 2] * 3

    def dx(dys: list[Tensor], weights: list[Tensor], lora_as: list[Tensor]) -> None:
        lists = (dys, weights, lora_as, [x] * 2, [x] * 2, [None] * 2)
        scales = (0, [1.0] * 2, [1.0] * 2, *[[False] * 2] * 2)
        OPS.backward_group(x, *lists, *scales, True, *none)

    dx([x, x], [x, x], [x, x])
    with pytest.raises(RuntimeError, match=r"weight.size\(1\) is 3 but must be 4"):
        dx([x, x], [x, narrow], [x, narrow])
    with pytest.raises(RuntimeError, match="number of rows of dy is 3 but must be 4"):
        dx([x, low], [x, x], [x, x])
    with pytest.raises(RuntimeError, match="dys must have one dtype, but have float32 and float16"):
        OPS.backward_group(
            x, [x, x.half()], [x, x.half()], [x, x.half()], [x, x.half()], [x, x], [None] * 2, 0,
            [1.0] * 2, [1.0] * 2, *[[False] * 2] * 2, True, *none,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_ends_one_element_early_is_refused(dtype):
    """Of a matrix that begins behind the start of its storage, whose last row and column count."""
    whole = torch.ones(6, 9, dtype=dtype)
    x, down = whole[2:, 1:], torch.ones(2, 8, dtype=dtype)
    whole.untyped_storage().resize_(54 * dtype.itemsize)
    assert torch.equal(OPS.down_proj(x, down, None, 0, 1.0), torch.full((4, 2), 8, dtype=dtype))
    whole.untyped_storage().resize_(53 * dtype.itemsize)
    with pytest.raises(RuntimeError, match="down_proj: x lies beyond its storage"):
        OPS.down_proj(x, down, None, 0, 1.0)
    x.untyped_storage().resize_(0)
    assert OPS.down_proj(x[:0], down, None, 0, 1.0).shape == (0, 2)  # nothing of it is read


# ---- what is served ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_where_nothing_survives_the_term_is_zero_and_not_divided(dtype, rows):
    """A threshold of 2^14 drops all; the package makes no such call, for p = 1 takes no kernel."""
    p = problems.make((rows, 40, 72, 9), dtype)
    h, dropped = p.x @ p.lora_a.to(dtype).T, (SEED, RANGE)
    assert not OPS.down_proj(p.x, p.lora_a, *dropped, 1.0).any()
    assert not OPS.weight_grad(h, p.x, *dropped, 1.0, False, False).any()
    plain = (p.x, p.weight, h[:, :0], p.lora_b[:, :0], p.bias, None, 0, 1.0)
    y = OPS.fused_gemm(p.x, p.weight, h, p.lora_b, p.bias, *dropped, 1.0)
    assert torch.equal(y, OPS.fused_gemm(*plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["whole", "masked"])
@pytest.mark.parametrize("m", [20, 90])
def test_dx_of_a_group_adds_up_scaled_terms(dtype, seed, m):
    """By a scale of the up projection that the package leaves to down projections."""
    parts = [problems.make_exact((m, 80, 72, 8), dtype, seed=s) for s in (1, 2)]
    x, lists = parts[0].x, [[getattr(p, n) for p in parts] for n in ("dy", "weight", "lora_a")]
    rest = ([p.lora_b for p in parts], [p.x[:, :8] for p in parts], [seed] * 2, 1 << 13)
    needs = ([False] * 2,) * 5
    dx, *_ = OPS.backward_group(
        x, *lists, *rest, [1.0] * 2, [2.0, 4.0], *needs[:2], True, *needs[2:]
    )
    expected = torch.zeros(m, 72, dtype=torch.float64)
    for p, scale in zip(parts, (2.0, 4.0), strict=True):
        term = scale * (p.dy @ p.lora_b).double() @ p.lora_a.double()
        if seed is not None:
            term = torch.where(OPS.dropout_mask(seed, m, 72, 1 << 13), 2 * term, 0)
        expected += p.dy.double() @ p.weight.double() + term
    assert torch.equal(dx.double(), expected)


MANY = 1 << 60


@pytest.mark.parametrize(
    "call, shape",
    [
        (lambda x: OPS.down_proj(x, x[:0], None, 0, 1.0), (MANY, 0)),
        (lambda x: OPS.fused_gemm(x, x[:0], x, x[:0], None, None, 0, 1.0), (MANY, 0)),
        (lambda x: OPS.weight_grad(x.T[:, :0].T, x.T, None, 0, 1.0, False, False), (0, MANY)),
        (lambda x: OPS.dropout_mask(SEED, MANY, 0, 0), (MANY, 0)),
    ],
    ids=["down_proj", "fused_gemm", "weight_grad", "dropout_mask"],
)
def test_nothing_is_not_walked_however_many_rows_it_has(call, shape):
    """In a thread, for who walks it does not come back."""
    found: list[Tensor] = []
    x = torch.empty(1, 0).expand(MANY, 0)
    walk = threading.Thread(target=lambda: found.append(call(x)), daemon=True)
    walk.start()
    walk.join(20)
    assert found and found[0].shape == shape

"""The Triton kernels at edges of tiles, of layouts and of rounding, in few launches.

Of the tests of every backend `make test` runs a sample in the interpreter (conftest.py): what
tells two kernels apart by its data alone is here.
"""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import tolerance
import torch
from test_lora_linear import has_only, strided_variants
from triton_interpreter import INTERPRETED

from lora_kernels import dropout
from lora_kernels.triton_kernels import configs

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="on CPU tensors Triton runs in its interpreter alone"
)
THRESHOLD = 3000


@pytest.mark.parametrize("origin", [(29, 32), (16, 25), (15, 31)], ids=["rows", "columns", "both"])
def test_windows_off_the_blocks_of_the_mask(origin):
    """15 rows and columns off, 50 of them take two tiles of 64."""
    from lora_kernels.triton_kernels.down_proj import down_proj
    from lora_kernels.triton_kernels.fused_gemm import fused_gemm
    from lora_kernels.triton_kernels.weight_grad import weight_grad

    seed = torch.tensor([5, 6, *origin])
    kept = dropout.reference_mask(seed, 50, 50, THRESHOLD).float()
    one, ones, eye, nothing = (
        torch.ones(50, 1),
        torch.ones(50, 50),
        torch.eye(50),
        torch.ones(50, 0),
    )
    drop = (seed, THRESHOLD, 1 / dropout.inverse_keep(THRESHOLD))
    for got in (
        down_proj(ones, eye, *drop),
        weight_grad(eye, ones, *drop, True, False),
        fused_gemm(nothing, nothing, one, one, None, *drop),
    ):
        torch.testing.assert_close(got, kept)


# ---- rounding ------------------------------------------------------------------------------------

# bfloat16 has 256 and 258 but not 257: what is rounded on the way loses the 1.
ADDENDS = torch.tensor([[256, 1, -256], [256, 1, 0], [256, 1, 1]], dtype=torch.bfloat16)
SUMS = torch.tensor([1.0, 256.0, 258.0], dtype=torch.bfloat16)  # 257 is a tie
SUMS_BY_SCALE = torch.tensor([1.5, 386.0, 388.0], dtype=torch.bfloat16)  # of 385.5 and 387
SCALE = 1.5
# In steps of 64: two addends in one, or each in a step of its own, and those in two parts.
ONE_PART, TWO_PARTS = (200, [10, 50, 130]), (520, [10, 70, 330])


def spread(length: int, places: list[int]) -> torch.Tensor:
    """The addends [3, length] at these places, and zeros between."""
    t = torch.zeros(3, length, dtype=torch.bfloat16)
    t[:, places] = ADDENDS
    return t


@pytest.mark.parametrize("length, places", [ONE_PART, TWO_PARTS], ids=["one_part", "two_parts"])
def test_a_sum_is_rounded_once(length, places):
    from lora_kernels.triton_kernels.down_proj import down_proj
    from lora_kernels.triton_kernels.weight_grad import grad_and_sums

    x, ones = spread(length, places), torch.ones(5, length, dtype=torch.bfloat16)
    h = down_proj(x, ones, None, 0, SCALE)
    grad, sums = grad_and_sums(ones.t().contiguous(), x.t(), None, 0, SCALE, False, True, True)
    assert all(torch.equal(got, SUMS_BY_SCALE) for got in (*h.t(), *grad.t()))
    assert torch.equal(sums, SUMS)


def test_a_sum_of_one_read_is_rounded_once():
    from lora_kernels.triton_kernels.weight_grad import down_and_weight_grad

    ones = torch.ones(5, 520, dtype=torch.bfloat16)
    h = torch.ones(3, 5, dtype=torch.bfloat16)
    run = (SCALE, SCALE, False, True, True)
    dh, _, _ = down_and_weight_grad(h, spread(*TWO_PARTS), ones, *run)
    dy = spread(520, [10, 50, 330]).t()  # two addends in one block of rows
    _, grad, sums = down_and_weight_grad(ones.t().contiguous(), dy, ones[:, :3], *run)
    assert all(torch.equal(got, SUMS_BY_SCALE) for got in (*dh.t(), *grad.t()))
    assert torch.equal(sums, SUMS)


@pytest.mark.parametrize("r", [16, 19])
@pytest.mark.parametrize("kind", configs.KINDS)
def test_y_is_rounded_once(kind, r, monkeypatch):
    """Columns: a product of two steps on the term, one on a term of two ranks, the bias on both."""
    from lora_kernels.triton_kernels.fused_gemm import fused_gemm

    plan = configs.Config(16, 32, 32, 16, 4, 2, 4, kind, group=2)
    monkeypatch.setattr(configs, "lookup", lambda *about: plan)
    x, h = torch.zeros(1, 72, dtype=torch.bfloat16), torch.zeros(1, r, dtype=torch.bfloat16)
    weight, up = x.repeat(3, 1), h.repeat(3, 1)
    x[0, [3, 40]] = h[0, [0, -1]] = 1
    up[:, 0] = 256
    weight[0, [3, 40]] = torch.tensor([1, -256], dtype=torch.bfloat16)
    up[1, -1], weight[1, 3] = 1, -256
    weight[2, 3], bias = 1, torch.tensor([0, 0, -256], dtype=torch.bfloat16)
    y = fused_gemm(x, weight, h, up, bias, None, 0, 1.0)
    assert torch.equal(y, torch.ones_like(y))


# ---- layouts, tails and scales -------------------------------------------------------------------


RANKS = pytest.mark.parametrize("r", [40, 5], ids=["two_reads", "one_read"])


@RANKS
def test_many_tiles_of_every_layout(r):
    """No operand is contiguous, x is a window off the blocks, no size a multiple of a tile."""
    problem = problems.make((150, 136, 202, r), torch.float16, scaling=3.0, dropout_p=0.3)
    problem = problems.sharded(problem, 13, 25)
    layouts = {
        "x": "every_second_row", "weight": "transposed", "lora_a": "transposed",
        "lora_b": "slice_of_wider", "dy": "transposed",
    }  # fmt: skip
    lain = {n: strided_variants(getattr(problem, n))[way] for n, way in layouts.items()}
    lain["bias"] = torch.stack((problem.bias, problem.bias * torch.nan), 1)[:, 0]
    tolerance.assert_c1(problem, replace(problem, **lain).run("triton", x=lain["x"]))


@pytest.mark.parametrize("wide", ["lora_a", "lora_b"])
@RANKS
def test_each_gradient_is_as_wide_as_its_adapter(r, wide):
    problem = problems.make((20, 24, 28, r), torch.float16)
    problem = replace(problem, **{wide: getattr(problem, wide).float()})
    got = problem.run("triton")
    tolerance.assert_c1(problem, got)
    assert not has_only(got[wide], torch.float16)


@pytest.mark.parametrize("empty", ["M", "N", "K", "r"])
def test_nothing_in_one_dimension(empty):
    sizes = (0 if d == empty else size for d, size in zip("MNKr", (4, 6, 5, 3), strict=True))
    problem = problems.make(tuple(sizes), dropout_p=0.3)
    tolerance.assert_c1(problem, problem.run("triton"))

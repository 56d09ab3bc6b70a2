"""Every backend against the float64 oracle: C1 to C5 over shapes, dtypes, dropout and layouts."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import problems
import pytest
import tolerance
import torch
from hypothesis import given, settings

import lora_kernels as lk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", problems.SHAPES.values(), ids=problems.SHAPES)
def test_c1_every_shape(backend, eager_like, shape, dtype, p):
    problem = problems.make(shape, dtype, dropout_p=p)
    tolerance.assert_c1(problem, problem.run(backend), eager_like=eager_like)


def has_only(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether float32 values were rounded to `dtype` on their way."""
    return torch.equal(t, t.to(dtype).to(t.dtype))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", problems.LARGE.values(), ids=problems.LARGE)
def test_c1_c2_large(backend, eager_like, shape, dtype, adapter, p):
    adapter_dtype = torch.float32 if adapter == "fp32" else dtype
    problem = problems.make(shape, dtype, adapter_dtype=adapter_dtype, dropout_p=p)
    got = problem.run(backend)
    assert got["y"].dtype == got["x"].dtype == dtype
    assert got["lora_a"].dtype == got["lora_b"].dtype == adapter_dtype
    tolerance.assert_c1(problem, got, eager_like=eager_like)
    tolerance.assert_c2(problem, got, eager_like=eager_like)
    if adapter_dtype != dtype:
        assert not any(has_only(got[name], dtype) for name in ("lora_a", "lora_b"))


@pytest.mark.parametrize("wide", ["lora_a", "lora_b"])
def test_adapters_of_two_dtypes(backend, eager_like, wide):
    """Each gradient is rounded to the dtype of its own parameter, alone and in a group."""
    problem = problems.make((65, 40, 130, 8), torch.bfloat16, dropout_p=0.3)
    problem = replace(problem, **{wide: getattr(problem, wide).float()})
    got = problem.run(backend)
    tolerance.assert_c1(problem, got, eager_like=eager_like)
    a, b = (t.clone().requires_grad_() for t in (problem.lora_a, problem.lora_b))
    (y,) = lk.fused_lora_linear_group(
        problem.x, [problem.weight], [a], [b], [problem.bias], scalings=problem.scaling,
        dropout_p=0.3, seeds=[problem.seed], backend=backend,
    )  # fmt: skip
    grads = dict(zip(("lora_a", "lora_b"), torch.autograd.grad(y, (a, b), problem.dy), strict=True))
    tolerance.assert_c1(problem, grads, eager_like=eager_like)
    for found in (got, grads):
        assert not has_only(found[wide], torch.bfloat16)
    for name in grads:
        assert grads[name].dtype == got[name].dtype == getattr(problem, name).dtype


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT.values(), ids=SIXTEEN_BIT)
def test_c3_at_most_eagers_error(backend, dtype, p):
    problem = problems.make(problems.LARGE["large"], dtype, dropout_p=p, bias=False)
    tolerance.assert_c3(problem, problem.run(backend))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_c4_exact(backend, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    m, n, k, r = (int(torch.randint(low, 60, (), generator=g)) for low in (1, 4, 4, 1))
    problem = problems.make_exact((m, n, k, r), dtype, seed)
    tolerance.assert_c4(problem, problem.run(backend))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "scales", [(0.0, 1.0), (0.0, 1e-3), (1.0, 0.0)], ids=["W=0", "W=0,B~1e-3", "B=0"]
)
def test_c5_each_term_alone(backend, eager_like, scales, dtype, p):
    problem = problems.make(
        (65, 40, 130, 12), dtype, dropout_p=p, bias=False, w_scale=scales[0], b_scale=scales[1]
    )
    tolerance.assert_c1(problem, problem.run(backend), eager_like=eager_like)


def strided_variants(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in layouts that callers produce: views that a kernel must not misread."""
    padded = torch.nan * torch.ones(*t.shape[:-1], t.shape[-1] + 5, dtype=t.dtype)
    padded[..., 3:-2] = t
    flat = torch.nan * torch.ones(t.numel() + 1, dtype=t.dtype)
    flat[1:] = t.reshape(-1)
    return {
        "transposed": t.transpose(0, 1).contiguous().transpose(0, 1),
        "slice_of_wider": padded[..., 3:-2],
        "odd_offset": flat[1:].view(t.shape),
        "every_second_row": torch.stack((t, t * torch.nan), dim=-2).flatten(-3, -2)[..., ::2, :],
        "columns_reversed_stride": t.t().contiguous().t() if t.dim() == 2 else t,
    }


# On either side of the branch for small problems.
STRIDED = {"small": (34, 28, 36, 6), "large": (130, 70, 90, 6)}


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("operand", ["x", "weight", "lora_a", "lora_b", "dy"])
@pytest.mark.parametrize("shape", STRIDED.values(), ids=STRIDED)
def test_fault_17_any_strides(backend, eager_like, shape, operand, dtype, p):
    problem = problems.make(shape, dtype, dropout_p=p)
    for name, view in strided_variants(getattr(problem, operand)).items():
        assert torch.equal(view, getattr(problem, operand)), name
        changed = replace(problem, **{operand: view})
        got = changed.run(backend, x=view if operand == "x" else None)
        tolerance.assert_c1(problem, got, eager_like=eager_like)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_strided_bias(backend, eager_like, dtype, p):
    problem = problems.make((34, 40, 36, 6), dtype, dropout_p=p)
    spread = torch.full((80,), torch.nan, dtype=dtype)
    spread[::2] = problem.bias
    y = lk.fused_lora_linear(
        problem.x, problem.weight, problem.lora_a, problem.lora_b, spread[::2],
        scaling=problem.scaling, dropout_p=p, seed=problem.seed, backend=backend,
    )  # fmt: skip
    tolerance.assert_c1(problem, {"y": y}, eager_like=eager_like)


@pytest.mark.parametrize("scaling", [2.0**112, -(2.0**112), 2.0**-112])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_extreme_scalings_of_nothing(backend, dtype, scaling):
    """A rank-0 or dropped adapter adds exactly nothing, whatever its scaling."""
    problem = problems.make((9, 8, 10, 0), dtype, scaling=scaling)
    base = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    torch.testing.assert_close(problem.run(backend)["y"], base)
    problem = problems.make((9, 8, 10, 3), dtype, scaling=scaling, dropout_p=1.0)
    base = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    torch.testing.assert_close(problem.run(backend)["y"], base)


def test_shards_draw_the_mask_of_the_whole(backend):
    """x split by rows and columns, with row0 and col0 in the seed, drops what the whole drops."""
    whole = problems.make((50, 20, 90, 4), dropout_p=0.4)
    mask = lk.dropout_mask(whole.seed, (50, 90), 0.4)
    for row0, col0, m, k in ((16, 32, 20, 40), (3, 7, 33, 50), (49, 89, 1, 1)):
        shard = problems.sharded(problems.make((m, 20, k, 4), dropout_p=0.4), row0, col0)
        shard = replace(shard, seed=torch.tensor([*whole.seed.tolist(), row0, col0]))
        got = lk.dropout_mask(shard.seed, (m, k), 0.4)
        assert torch.equal(got, mask[row0 : row0 + m, col0 : col0 + k])
        tolerance.assert_c1(shard, shard.run(backend), eager_like=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    r=st.integers(0, 40),
    dtype=st.sampled_from(list(DTYPES.values())),
    wide=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.97]),
    scaling=st.sampled_from([0.25, 1.0, -3.0, 16.0]),
    bias=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "slice_of_wider", "odd_offset"]),
    seed=st.integers(0, 10**6),
)
def test_random_problems(m, n, k, r, dtype, wide, p, scaling, bias, layout, seed):
    problem = problems.make(
        (m, n, k, r), dtype, adapter_dtype=torch.float32 if wide else dtype, scaling=scaling,
        dropout_p=p, bias=bias, generator_seed=seed,
    )  # fmt: skip
    x = problem.x if layout == "plain" else strided_variants(problem.x)[layout]
    for backend in ("cpu", "composed", "reference"):
        if lk.backends()[backend] is None:
            got = replace(problem, x=x).run(backend, x=x)
            tolerance.assert_c1(problem, got, eager_like=backend == "composed")

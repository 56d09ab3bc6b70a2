"""Backend cpu on a processor with 16-bit GEMMs: the frozen product is the vendor's, rounded once.

Every other test runs it by way of float32, wherever it runs; here the vendor's 16-bit GEMM is taken
as on such a processor, which torch has on any other too, slowly.
"""

from __future__ import annotations

import group_calls
import problems
import pytest
import tolerance
import torch

import lora_kernels as lk
from lora_kernels import backend as backends

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def native():
    if lk.backends()["cpu"] is not None:
        pytest.skip("no C++ kernels for the CPU")
    backends.multiply_natively(*DTYPES.values())
    yield
    backends.multiply_natively()


@pytest.fixture(params=DTYPES.values(), ids=list(DTYPES))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", problems.SHAPES.values(), ids=problems.SHAPES)
def test_c1_every_shape(shape, dtype, p):
    problem = problems.make(shape, dtype, dropout_p=p)
    tolerance.assert_c1(problem, problem.run("cpu"), eager_like=True)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("shape", problems.LARGE.values(), ids=problems.LARGE)
def test_large(shape, dtype, adapter, p):
    problem = problems.make(shape, dtype, adapter_dtype=adapter, dropout_p=p)
    got = problem.run("cpu")
    tolerance.assert_c1(problem, got, eager_like=True)
    tolerance.assert_c2(problem, got, eager_like=True)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_c3_at_most_eagers_error(dtype, p):
    problem = problems.make(problems.LARGE["large"], dtype, dropout_p=p, bias=False)
    tolerance.assert_c3(problem, problem.run("cpu"))


@pytest.mark.parametrize("scales", [(0.0, 1e-3), (1.0, 0.0)], ids=["W=0,B~1e-3", "B=0"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_c5_each_term_alone(scales, dtype, p):
    problem = problems.make(
        (130, 70, 90, 12), dtype, dropout_p=p, bias=False, w_scale=scales[0], b_scale=scales[1]
    )
    tolerance.assert_c1(problem, problem.run("cpu"), eager_like=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", group_calls.SHAPES)
def test_groups(shape, dtype, p):
    """The bits of separate calls, and a dx that is added up in fp32."""
    group = group_calls.make(shape, dtype, p=p)
    group_calls.assert_like_separate(group, "cpu", eager_like=True, sum_eager_like=True)


def test_the_vendor_multiplies(dtype):
    """Beyond the branch for small problems y without an adapter has the bits of F.linear."""
    p = problems.make((150, 300, 200, 4), dtype)
    y = lk.fused_lora_linear(p.x, p.weight, p.lora_a, p.lora_b, p.bias, scaling=0.0, backend="cpu")
    assert torch.equal(y, torch.nn.functional.linear(p.x, p.weight, p.bias))


def test_one_dtype_alone_is_the_vendors(dtype):
    """The other goes by way of float32, as its strict bound tells."""
    backends.multiply_natively(dtype)
    (other,) = set(DTYPES.values()) - {dtype}
    p = problems.make((150, 300, 200, 4), other)
    tolerance.assert_c1(p, p.run("cpu"))
    assert backends.eager_like("cpu", dtype) and not backends.eager_like("cpu", other)
    p = problems.make((150, 300, 200, 4), dtype)
    with pytest.raises(AssertionError, match="C1"):
        tolerance.assert_c1(p, p.run("cpu"))


def test_the_automatic_choice_is_cpu(dtype):
    p = problems.make((5, 8, 8, 2), dtype)
    found = lk.explain(p.x, p.weight, p.lora_a, p.lora_b)
    assert found.backend == "cpu"

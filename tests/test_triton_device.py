"""Backend `triton` on a device: what its interpreter cannot show."""

from __future__ import annotations

import pytest
import torch
from problems import SHAPES, check_rows_past_2_31_elements, make, make_exact, on_device, sharded
from problems import run_on_device as run
from tolerance import assert_c1, assert_c2, assert_c4

import lora_kernels as lk
from lora_kernels.dropout import drop_threshold

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(shape, dtype, p):
    problem = make(shape, dtype, dropout_p=p)
    got = run(problem, "triton")
    assert_c1(problem, got)
    assert_c2(problem, got)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(700, 528, 592, 16), (700, 528, 592, 64)])
def test_whole_vectors_and_more_than_a_tile(shape, dtype):
    """Tiles that TMA and cp.async load, with sums that are split."""
    problem = make(shape, dtype, dropout_p=0.1)
    got = run(problem, "triton")
    assert_c1(problem, got)
    assert_c2(problem, got)


@pytest.mark.parametrize("origin", [(32, 48), (3, 21)])
def test_a_window_of_the_mask(origin):
    problem = sharded(make((200, 144, 272, 16), torch.bfloat16, dropout_p=0.3), *origin)
    assert_c1(problem, run(problem, "triton"))


def test_float32_adapters():
    problem = make((200, 136, 264, 16), torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1)
    got = run(problem, "triton")
    assert got["lora_a"].dtype == got["lora_b"].dtype == torch.float32
    assert_c1(problem, got)


def test_exact_problems():
    for seed in range(4):
        problem = make_exact((128, 64, 128, 16), torch.bfloat16, seed)
        assert_c4(problem, run(problem, "triton"))


def test_same_bits_on_every_stream_and_in_every_run():
    problem = on_device(make((2000, 1024, 2048, 16), torch.bfloat16, dropout_p=0.1))
    first = problem.run("triton")
    for _ in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = problem.run("triton")
        stream.synchronize()
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_fault_33_graph_capture():
    """Nothing synchronises with the host once it is compiled, and a replay computes the same."""
    p = on_device(make((2000, 128, 512, 16), torch.bfloat16, dropout_p=0.1))
    call = (p.x, p.weight, p.lora_a, p.lora_b, p.bias)
    options = dict(dropout_p=0.1, seed=p.seed, backend="triton")
    expected = lk.fused_lora_linear(*call, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lk.fused_lora_linear(*call, **options)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_the_mask_is_that_of_every_backend():
    """A down projection by the identity shows which elements survive."""
    from lora_kernels.triton_kernels.down_proj import down_proj

    x, eye = torch.ones(80, 64, device="cuda"), torch.eye(64, device="cuda")
    for seed in ([5, 6], [5, 6, 32, 16], [5, 6, 3, 21]):
        seed = torch.tensor(seed, device="cuda")
        h = down_proj(x, eye, seed, drop_threshold(0.3), 1.0)
        assert torch.equal(h != 0, lk.dropout_mask(seed, (80, 64), 0.3))


def test_other_strides_of_x():
    """Columns that are contiguous, and rows that are no whole vectors."""
    problem = on_device(make((200, 144, 272, 16), torch.bfloat16))
    want = {name: t.cpu() for name, t in problem.run("triton").items()}
    wider = torch.zeros(200, 275, device="cuda", dtype=torch.bfloat16)
    wider[:, 1:273] = problem.x
    for x in (problem.x.t().contiguous().t(), wider[:, 1:273]):
        y = lk.fused_lora_linear(
            x, problem.weight, problem.lora_a, problem.lora_b, problem.bias,
            scaling=problem.scaling, backend="triton",
        )  # fmt: skip
        error = (y.cpu().double() - want["y"].double()).norm()
        assert error <= 1e-2 * want["y"].double().norm()


def test_fault_20_rows_past_2_31_elements():
    check_rows_past_2_31_elements("triton", 2064)

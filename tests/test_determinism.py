"""The same bits from one call: repeats, threads, modes of torch, streams, graphs, other rows."""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import torch
from conftest import USABLE
from test_kernels import THRESHOLD

import lora_kernels as lk

OPS = torch.ops.lora_kernels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = (260, 140, 330, 16)  # past every block of the C++ kernels, and the branch of small problems
OWN = ("lora_a", "lora_b", "bias")  # gradients that no vendor's GEMM makes on backend cpu


def assert_same(got: dict, want: dict, names=None) -> None:
    for name in names or want:
        assert torch.equal(got[name], want[name]), name


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", [n for n in USABLE if n in ("cpu", "composed")])
def test_repeats_on_any_number_of_threads_give_the_same_bits(name, dtype, threads):
    """All of them; those of the C++ kernels whatever the number is."""
    problem, by_threads = problems.make(SHAPE, dtype, dropout_p=0.3), []
    for count in (1, 2, 3):
        threads(count)
        first, *others = (problem.run(name) for _ in range(3))
        for other in others:
            assert_same(other, first)
        by_threads.append(first)
    if name == "cpu":
        for other in by_threads[1:]:
            assert_same(other, by_threads[0], OWN)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_deterministic_mode_is_served_with_the_same_bits(backend, p):
    problem = problems.make((33, 47, 65, 7), torch.bfloat16, dropout_p=p)
    want = problem.run(backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(problem.run(backend), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_other_rows_hold_changes_no_bit_of_a_row(backend, p):
    """Among as many rows: how many there are may choose another order of sums."""
    problem = problems.make((50, 40, 65, 8), dropout_p=p)
    other = replace(problem, x=-3 * problem.x, dy=problem.dy.flip(1))
    for row in (0, 17, 49):
        other.x[row], other.dy[row] = problem.x[row], problem.dy[row]
    got, want = other.run(backend), problem.run(backend)
    for name in ("y", "x"):
        same = (got[name] == want[name]).all(1)
        assert same[[0, 17, 49]].all() and not same.all()


@pytest.mark.parametrize("rows", [1, 5, 47, 49, 200])
@pytest.mark.parametrize("name, seed", [("fp32", [1, 2]), ("bf16", None), ("fp16", [1, 2])])
def test_h_of_a_row_does_not_depend_on_the_number_of_rows(name, seed, rows):
    """By the C++ down_proj, which has one order of sums; undropped fp32 of few rows is a GEMM's."""
    p = problems.make(SHAPE, DTYPES[name])
    seed = None if seed is None else torch.tensor(seed)
    whole, part = (OPS.down_proj(x, p.lora_a, seed, THRESHOLD, 1.3) for x in (p.x, p.x[:rows]))
    assert torch.equal(part, whole[:rows])


# ---- on a device ---------------------------------------------------------------------------------


def kernels_of(name: str) -> str:
    if lk.backends()[name] is not None:
        pytest.skip(lk.backends()[name])
    return name


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_stream_and_deterministic_mode_give_the_same_bits(name, p):
    problem = problems.on_device(problems.make((2000, 136, 520, 16), torch.bfloat16, dropout_p=p))
    want = problem.run(kernels_of(name))
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(problem.run(name), want)
    finally:
        torch.use_deterministic_algorithms(False)
    for _ in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = problem.run(name)
        stream.synchronize()
        assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_replay_of_a_graph_gives_the_bits_of_eager_mode(name, p):
    problem = problems.on_device(problems.make((2000, 136, 520, 16), torch.bfloat16, dropout_p=p))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for before a capture of a backward pass
        want = problem.run(kernels_of(name))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = problem.run(name)
    for _ in range(3):
        for t in got.values():
            t.fill_(torch.nan)
        graph.replay()
        assert_same(got, want)

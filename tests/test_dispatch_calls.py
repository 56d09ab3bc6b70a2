"""What the choice by shape takes a call for: how many rows it has, and whether it trains."""

from __future__ import annotations

import problems
import pytest
import test_dispatch
import torch
from dispatch_facts import points
from test_dispatch import SMALL, evidence

import lora_kernels as lk

toy = test_dispatch.toy  # a fixture
SHAPE = (32, 256, 512, 8)  # in SMALL
COMPILED = dict(fullgraph=True, backend="aot_eager")


def single(p: problems.Problem, run=lk.fused_lora_linear) -> None:
    run(p.x, p.weight, p.lora_a, p.lora_b, p.bias)


def grouped(p: problems.Problem, run=lk.fused_lora_linear_group) -> None:
    run(p.x, [p.weight], [p.lora_a], [p.lora_b], [p.bias], scalings=1.0)


def compiled(p: problems.Problem) -> None:
    single(p, torch.compile(lk.fused_lora_linear, **COMPILED))


def compiled_group(p: problems.Problem) -> None:
    grouped(p, torch.compile(lk.fused_lora_linear_group, **COMPILED))


@pytest.mark.parametrize(
    "run, trained",
    [
        *((run, name) for run in (single, grouped) for name in problems.GRADS),
        (compiled, "bias"),
        (compiled_group, "bias"),
    ],
)
def test_a_call_trains_if_any_operand_requires_grad(toy, run, trained):
    """Of a forward pass alone composed is slower, of training nothing is known."""
    known = points(box=SMALL, dtype="float32", passes=["forward"], dropouts=[False])
    toy.learn(evidence(*known))
    problem = problems.make(SHAPE)
    run(problem)
    assert toy.calls == ["forward"]
    getattr(problem, trained).requires_grad_()
    run(problem)
    assert toy.calls == ["forward"]


@pytest.mark.parametrize("lead, inside", [((2, 16), True), ((32, 4), False)], ids=str)
def test_rows_are_those_of_all_leading_dimensions(toy, lead, inside):
    single(problems.make(SHAPE, lead=lead))
    assert bool(toy.calls) == inside


@pytest.mark.parametrize("run", [single, grouped])
def test_a_backend_that_comes_later_is_noticed(toy, run):
    problem = problems.make(SHAPE)
    toy.learn(evidence())
    run(problem)
    assert toy.calls == []
    toy.learn(evidence(*points(box=SMALL, dtype="float32", dropouts=[False])))
    run(problem)
    assert toy.calls == ["forward"]


def test_explain_takes_a_call_for_what_it_is(toy):
    toy.learn(evidence(*points(box=SMALL, dtype="float32", passes=["training"])))
    p = problems.make(SHAPE)
    args = (p.x, p.weight, p.lora_a, p.lora_b, p.bias)
    assert lk.explain(*args).backend != "toy", "nothing trains"
    p.bias.requires_grad_()
    assert lk.explain(*args).backend == "toy"
    assert lk.explain(*args, scaling=0.0).backend != "toy", "an adapter that is off has rank 0"
    with torch.no_grad():
        assert lk.explain(*args).backend != "toy"

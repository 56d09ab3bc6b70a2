"""What is timed against what: one LoRA linear layer, computed in every way we compare."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor

import lora_kernels as lk

from .shapes import DTYPES, Case

BASELINES = ("frozen", "peft", "peft_fp32", "addmm", "compiled")
MODES = ("forward", "fwd+bwd")
SCALING = 2.0  # lora_alpha = 2 r


class Problem(NamedTuple):
    """One layer's operands; x, lora_a and lora_b require grad."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    dy: Tensor  # [M, N]


class Contender(NamedTuple):
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]  # that fwd+bwd computes gradients of

    def call(self, mode: str, dy: Tensor) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        """The timed callable. Both modes record a graph, as a training step does."""
        if mode == "forward":
            return self.forward
        return lambda: torch.autograd.grad(self.forward(), self.inputs, dy)


def make_problem(case: Case, device: str) -> Problem:
    """Normal operands, scaled so that y is of order 1."""
    (_, m, n, k), r = case.shape, case.rank
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, cols: int, scale: float, grad: bool = False) -> Tensor:
        t = torch.randn(rows, cols, generator=generator, device=device) * scale
        return t.to(DTYPES[case.dtype]).requires_grad_(grad)

    return Problem(
        x=normal(m, k, 1.0, grad=True),
        weight=normal(n, k, k**-0.5),
        lora_a=normal(r, k, k**-0.5, grad=True),
        lora_b=normal(n, r, r**-0.5, grad=True),
        dy=normal(m, n, 1.0),
    )


def peft_formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """The arithmetic of peft.tuners.lora.Linear.forward: it casts x for the LoRA branch only."""
    y = F.linear(x, weight)
    x = x.to(a.dtype)
    dropped = F.dropout(x, p) if p > 0 else x
    return (y + F.linear(F.linear(dropped, a), b) * SCALING).to(y.dtype)


def addmm_formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """The up projection accumulated onto the frozen product: eager PyTorch with two passes less."""
    dropped = F.dropout(x, p) if p > 0 else x
    return torch.addmm(F.linear(x, weight), F.linear(dropped, a), b.t(), alpha=SCALING)


def make_contenders(
    problem: Problem, dropout_p: float, backends: list[str], skip: set[str]
) -> dict[str, Contender]:
    """By name: those of BASELINES that are not in `skip`, then our `backends`."""
    x, weight, lora_a, lora_b, _ = problem
    inputs = (x, lora_a, lora_b)
    found = {
        "frozen": Contender(lambda: F.linear(x, weight), (x,)),
        "peft": Contender(lambda: peft_formula(*problem[:4], dropout_p), inputs),
    }
    if x.dtype != torch.float32:
        wide_a, wide_b = (t.detach().float().requires_grad_() for t in (lora_a, lora_b))
        found["peft_fp32"] = Contender(
            lambda: peft_formula(x, weight, wide_a, wide_b, dropout_p), (x, wide_a, wide_b)
        )
    found["addmm"] = Contender(lambda: addmm_formula(*problem[:4], dropout_p), inputs)
    torch._dynamo.reset()  # past its limit of recompilations it would refuse the next shape
    torch._inductor.config.compile_threads = 1  # no workers beside what is timed
    compiled = torch.compile(peft_formula, dynamic=False, fullgraph=True)
    found["compiled"] = Contender(lambda: compiled(*problem[:4], dropout_p), inputs)
    found = {name: contender for name, contender in found.items() if name not in skip}
    for backend in backends:
        call = functools.partial(
            lk.fused_lora_linear,
            x, weight, lora_a, lora_b, scaling=SCALING, dropout_p=dropout_p, backend=backend,
        )  # fmt: skip
        found[backend] = Contender(call, inputs)
    return found


def automatic(problem: Problem, dropout_p: float = 0.0) -> str:
    """The backend that fused_lora_linear picks by itself for a step of training."""
    return lk.explain(*problem[:4], scaling=SCALING, dropout_p=dropout_p).backend


def chosen_backends(problem: Problem, named: list[str] | None, reference: bool) -> list[str]:
    """`named`, or all of our backends that serve this problem, `reference` on demand only."""
    if named:
        return named
    found = []
    for name, missing in lk.backends().items():
        if missing is None and (reference or name != "reference"):
            with contextlib.suppress(RuntimeError):  # it does not serve this device or dtype
                lk.explain(*problem[:4], scaling=SCALING, backend=name)
                found.append(name)
    return found


def expected(problem: Problem, mode: str) -> tuple[Tensor, ...]:
    """(y,) or (dx, dA, dB) of the reference at p = 0."""
    exact = Contender(
        lambda: lk.reference.lora_linear(*problem[:4], scaling=SCALING),
        (problem.x, problem.lora_a, problem.lora_b),
    )
    result = exact.call(mode, problem.dy)()
    return (result.detach(),) if isinstance(result, Tensor) else result


def relative_error(result: Tensor | tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The worst over the results of |result - exact| / |exact|, in Frobenius norms."""
    results = (result.detach(),) if isinstance(result, Tensor) else result
    errors = [
        (got.float() - want.float()).norm() / want.float().norm()
        for got, want in zip(results, exact, strict=True)
    ]
    return torch.stack(errors).max().item()  # NaN if any is, which Python's max may lose


def tolerance(dtype: torch.dtype) -> float:
    """Half of the dtype's digits: rounding stays far below it, a wrong kernel does not."""
    return torch.finfo(dtype).eps ** 0.5

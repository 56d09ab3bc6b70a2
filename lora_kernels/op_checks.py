"""Every operator and form once against float64, on small problems, for `selfcheck`.

Operands are made on the CPU, so that they do not depend on the device's generator. Each result is
held to C1 (`criterion`). A call that a plan refuses is "not served"; one that raises anything else
is wrong.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import backend as backends
from . import criterion, dropout
from ._ops import ops as OPS
from .criterion import Oracle
from .functional import fused_lora_linear
from .records import NOT_SERVED, RIGHT, WRONG, Check
from .schemas import KERNELS, has_kernel

# M, N, K, r: ragged everywhere; a multiple of every tile; more than one tile; a wide rank; decode.
SHAPES = (
    (17, 40, 72, 3), (128, 128, 128, 16), (145, 264, 328, 24), (130, 72, 200, 130),
    (8, 512, 256, 16),
)  # fmt: skip
DROPOUTS = (0.0, 0.1)
FORWARD_FORMS = ("one_launch", "two_launches", "decode", "sm80")
BACKWARD_FORMS = ("one_grid", "passes", "sm80")
SCALING = 1.5
WHOLE = "fused_lora_linear"
GRADS = ("x", "lora_a", "lora_b", "bias")
# What the plans say of a call that they have no kernel for, and argument checks of a form.
_REFUSALS = ("not served", "take lora_kernels.composed", ": form is '")

Results = dict[str, Tensor]  # by the names of criterion.Oracle
Find = Callable[[str], Callable[..., Tensor]]  # a kernel by its name
About = tuple[str, str, str, bool, tuple[int, ...]]  # of a Check: op, form, dtype, dropout, shape


@dataclass(frozen=True)
class Problem:
    """One layer's operands and the upstream gradient, on the device that is checked."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None

    @property
    def drop(self) -> tuple[Tensor | None, int]:
        return self.seed, dropout.drop_threshold(self.dropout_p)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.lora_a, self.lora_b, self.bias

    def step(self, backend: str) -> Results:
        """y and all gradients of `fused_lora_linear`."""
        x, a, b = (t.detach().requires_grad_() for t in (self.x, self.lora_a, self.lora_b))
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        with torch.enable_grad():
            y = fused_lora_linear(
                x, self.weight, a, b, bias, scaling=self.scaling, dropout_p=self.dropout_p,
                seed=self.seed, backend=backend,
            )  # fmt: skip
        inputs = [x, a, b] if bias is None else [x, a, b, bias]
        return {
            "y": y.detach(),
            **dict(zip(GRADS, torch.autograd.grad(y, inputs, self.dy), strict=False)),
        }


def make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    p: float,
    device: torch.device,
    *,
    bias: bool = True,
    number: int = 0,
    on: torch.device | None = None,
) -> Problem:
    """Normal operands of which base and LoRA term are of x's size, drawn on `on` (the CPU)."""
    m, n, k, r = shape
    on = on or torch.device("cpu")
    generator = torch.Generator(on).manual_seed(number)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(*size, generator=generator, device=on) * scale
        return t.to(dtype).to(device)

    return Problem(
        x=normal(m, k),
        weight=normal(n, k, scale=k**-0.5),
        lora_a=normal(r, k, scale=k**-0.5),
        lora_b=normal(n, r, scale=r**-0.5),
        bias=normal(n) if bias else None,
        dy=normal(m, n),
        scaling=SCALING,
        dropout_p=p,
        seed=torch.tensor([11 + r, 5, 3, 7], device=device) if p > 0 else None,
    )


# ---- the calls -----------------------------------------------------------------------------------


def _operator(name: str) -> Callable[..., Tensor]:
    return getattr(OPS, name)


def _triton_kernel(name: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(f".triton_kernels.{name}", __package__), name)


def _down_proj(p: Problem, o: Oracle, kernel: Find = _operator) -> Results:
    run = kernel("down_proj")
    return {
        "h": run(p.x, p.lora_a, *p.drop, p.scaling),
        "dh": run(p.dy, p.lora_b.t(), None, 0, p.scaling),
    }


def _fused_gemm(p: Problem, o: Oracle, kernel: Find = _operator) -> Results:
    run, (h, dh) = kernel("fused_gemm"), _ranks(p, o)
    return {
        "y": run(p.x, p.weight, h, p.lora_b, p.bias, None, 0, 1.0),
        "x": run(p.dy, p.weight.t(), dh, p.lora_a.t(), None, *p.drop, 1.0),
    }


def _weight_grad(p: Problem, o: Oracle, kernel: Find = _operator) -> Results:
    run, (h, dh) = kernel("weight_grad"), _ranks(p, o)
    return {
        "lora_a": run(dh, p.x, *p.drop, 1.0, False, False),
        "lora_b": run(h, p.dy, None, 0, 1.0, False, True),
    }


def _ranks(p: Problem, o: Oracle) -> tuple[Tensor, Tensor]:
    """h and dh, rounded once."""
    return o.value["h"].to(p.x.dtype), o.value["dh"].to(p.x.dtype)


def _forward(p: Problem, o: Oracle, form: str | None = None) -> Results:
    args = (*p.operands, *p.drop, p.scaling, 1.0)
    y, h = OPS.forward(*args) if form is None else OPS.forward_as(*args, form, 0, 0)
    return {"y": y, "h": h}


def _backward(p: Problem, o: Oracle, form: str | None = None) -> Results:
    h, _ = _ranks(p, o)
    operands = (p.dy, p.x, p.weight, p.lora_a, p.lora_b, h, *p.drop, p.scaling, 1.0)
    args = (*operands, False, False, True, True, True, True)
    grads = OPS.backward(*args) if form is None else OPS.backward_as(*args, form, 0, 0)
    return dict(zip(GRADS, grads, strict=True))


CALLS: dict[tuple[str, str], Callable[[Problem, Oracle], Results]] = {
    ("down_proj", ""): _down_proj,
    ("fused_gemm", ""): _fused_gemm,
    ("weight_grad", ""): _weight_grad,
    ("forward", ""): _forward,
    ("backward", ""): _backward,
    **{("forward_as", form): functools.partial(_forward, form=form) for form in FORWARD_FORMS},
    **{("backward_as", form): functools.partial(_backward, form=form) for form in BACKWARD_FORMS},
}  # fmt: skip
TRITON_CALLS = {
    (name, ""): functools.partial(run, kernel=_triton_kernel)
    for name, run in zip(KERNELS, (_down_proj, _fused_gemm, _weight_grad), strict=True)
}
GROUPS = ("forward_group", "backward_group")


# ---- the checks ----------------------------------------------------------------------------------


def count(dtypes: list[torch.dtype], backend: str = "cuda") -> int:
    """How many checks `run` yields."""
    calls = len(TRITON_CALLS) if backend == "triton" else len(CALLS) + len(GROUPS)
    return len(dtypes) * len(SHAPES) * len(DROPOUTS) * (calls + 1)


def run(backend: str, device: torch.device, dtypes: list[torch.dtype]) -> Iterator[Check]:
    """One Check for each operator, form, shape, dtype and dropout; of Triton the kernels alone."""
    triton = backend == "triton"
    calls, library = (TRITON_CALLS, None) if triton else (CALLS, device.type.upper())
    for dtype in dtypes:
        eager_like = backends.eager_like(backend, dtype)
        for shape in SHAPES:
            for p in DROPOUTS:
                problem = make(shape, dtype, p, device)
                exact = criterion.oracle(problem)
                for (op, form), call in calls.items():
                    bound = functools.partial(call, problem, exact)
                    yield check(op, form, library, problem, bound, exact, eager_like)
                step = functools.partial(problem.step, backend)
                yield check(WHOLE, "", None, problem, step, exact, eager_like)
                if not triton:
                    yield from _groups(device, problem, exact, eager_like)


def check(
    op: str,
    form: str,
    library: str | None,
    problem: Problem,
    call: Callable[[], Results],
    exact: Oracle,
    eager_like: bool = False,
) -> Check:
    """Runs one call and judges its results. `library`: "CPU" or "CUDA" if it needs C++ of that."""
    m, k = problem.x.shape
    n, r = problem.lora_b.shape
    dtype = problem.x.dtype
    about: About = (
        op,
        form,
        str(dtype).removeprefix("torch."),
        problem.dropout_p > 0,
        (m, n, k, r),
    )
    if library is not None and not has_kernel(op, library):
        return Check(*about, NOT_SERVED, None, f"no C++ kernel for {library} is built")
    try:
        got = call()
        used = criterion.usage(exact, got, dtype, eager_like=eager_like)
    except Exception as error:  # of any kind: a kernel that faults must not end the check
        return failed(about, error)
    bad = [name for name, value in used.items() if not value <= 1]
    if bad:
        finite = [used[name] for name in bad if used[name] < float("inf")]
        note = f"{', '.join(bad)} past the bound of C1"
        return Check(*about, WRONG, max(finite, default=None), note)
    return Check(*about, RIGHT, max(used.values()))


def failed(about: About, error: Exception) -> Check:
    """The check that ended in an error; `about` is its op, form, dtype, dropout and shape."""
    text = _line(str(error))
    if isinstance(error, RuntimeError) and any(words in text for words in _REFUSALS):
        return Check(*about, NOT_SERVED, None, text)
    return Check(*about, WRONG, None, f"{type(error).__name__}: {text}")


def _groups(device: torch.device, one: Problem, exact: Oracle, eager_like: bool) -> Iterator[Check]:
    """Two projections of one x: the problem's own, and another's weights."""
    m, k = one.x.shape
    n, r = one.lora_b.shape
    other = make((m, n, k, r), one.x.dtype, one.dropout_p, device, number=1)
    other = replace(other, x=one.x, seed=None if one.seed is None else one.seed + 1)
    parts = (one, other)
    each = (exact, criterion.oracle(other))
    dx = criterion.group_oracle(each)
    weights, lora_as, lora_bs, biases = (
        list(ts) for ts in zip(*(p.operands[1:] for p in parts), strict=True)
    )
    seeds, scales = [p.seed for p in parts], [SCALING] * 2
    threshold, true = one.drop[1], [True] * 2

    # The second projection's results are checked beside the first's, under names of their own.
    named = ("y", "h", "lora_a", "lora_b", "bias")
    joint = Oracle(
        **{
            kind: {"x": getattr(dx, kind)["x"]}
            | {f"{name}{i}": getattr(o, kind)[name] for i, o in enumerate(each) for name in named}
            for kind in ("value", "total", "middle", "length", "partial")
        }
    )

    def forward() -> Results:
        ys, hs = OPS.forward_group(
            one.x, weights, lora_as, lora_bs, biases, seeds, threshold, scales, [1.0, 1.0]
        )
        return _numbered(y=ys, h=hs)

    def backward() -> Results:
        hs, false = [_ranks(p, o)[0] for p, o in zip(parts, each, strict=True)], [False] * 2
        dx, das, dbs, dbiases = OPS.backward_group(
            one.x, [p.dy for p in parts], weights, lora_as, lora_bs, hs, seeds, threshold, scales,
            [1.0, 1.0], false, false, True, true, true, true,
        )  # fmt: skip
        return {"x": dx, **_numbered(lora_a=das, lora_b=dbs, bias=dbiases)}

    for op, call in zip(GROUPS, (forward, backward), strict=True):
        yield check(op, "", device.type.upper(), one, call, joint, eager_like)


def _numbered(**lists: list[Tensor]) -> Results:
    return {f"{name}{i}": t for name, ts in lists.items() for i, t in enumerate(ts)}


def _line(text: str) -> str:
    """Its first line, short and printable: what a record holds."""
    first = (text.strip().splitlines() or [""])[0]
    return "".join(c if c.isprintable() else " " for c in first)[:300]

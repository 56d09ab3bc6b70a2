"""Checks every kernel on this machine and times the whole op against `composed`: a verdict.

    record = selfcheck("cuda")               # python -m lora_kernels selfcheck
    record = selfcheck("cuda", "triton")     # python -m lora_kernels selfcheck --backend triton

First each operator and form against float64 (`op_checks`), then `fused_lora_linear` at the points
of the shape classes: results against float64, forward alone and forward with backward, timed in
turns with backend `composed`. On a GPU the verdict is stored and steers the automatic choice
(`dispatch`); on a CPU backend `cpu`, or `triton` under its interpreter, is checked in the same way,
and steers nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import backend as backends
from . import criterion, dispatch, op_checks, records, timing, verdicts
from . import machine as machines
from .functional import fused_lora_linear
from .op_checks import Problem, Results
from .records import NOT_SERVED, Check, Record
from .shape_classes import PASSES, Point

Shape = tuple[int, int, int, int]  # M, N, K, r


def _grid(*sizes: Sequence[int]) -> list[Shape]:
    return [(m, n, k, r) for m, n, k, r in itertools.product(*sizes)]


# Each is whole boxes of shape_classes.EDGES: other shapes are measured but make no class.
SHAPES: dict[str, list[Shape]] = {
    "small": _grid((16, 64), (256, 1024), (256, 1024), (4, 16)),
    "few": _grid((4096, 16384), (1024, 4096), (1024, 4096), (16, 64)),
    "default": _grid((1, 16, 64), (1024, 4096, 16384), (1024, 4096, 16384), (16, 64))
    + _grid((1024, 4096, 16384), (1024, 4096, 16384), (1024, 4096, 16384), (16, 64)),
}
DTYPES = {  # of a backend on a GPU; on a CPU those of cpu
    "cuda": (torch.bfloat16, torch.float16),
    "cpu": (torch.float32,),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
}
DROPOUT = 0.1
ROUNDS = 20  # most samples of one contender at a point
SECONDS = 0.3  # in which those of a point must fit, or there are fewer
SAMPLED_ROWS = 64  # of y and dx that are compared with float64; no row depends on another

Progress = Callable[[int, int, str], None]  # done, of how many, what is next


class CannotRun(Exception):
    """Nothing was checked; the message says why and what to do."""


def default_dtypes(device: torch.device, backend: str | None = None) -> tuple[torch.dtype, ...]:
    """What is checked of a backend on a device; nothing on a device that has none."""
    return DTYPES.get(device.type if device.type == "cpu" else backend or device.type, ())


def default_shapes(device: torch.device) -> list[Shape]:
    return SHAPES["default" if device.type == "cuda" else "small"]


def backend_of(
    device: torch.device, dtypes: Sequence[torch.dtype], backend: str | None = None
) -> str:
    """The backend that is checked on a device: this one, or that of its type.

    Raises:
        CannotRun: it cannot run here, or has no kernels for a dtype.
    """
    if device.type not in ("cpu", "cuda"):
        raise CannotRun(f"device is {device}; expected a CPU or a CUDA device")
    name = backend or device.type
    if name not in DTYPES:
        raise CannotRun(f"backend is {name!r}; expected one of {', '.join(DTYPES)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        interpreted = " and TRITON_INTERPRET=1" if name == "triton" else ""
        raise CannotRun(
            "torch sees no CUDA device; check nvidia-smi and that torch.version.cuda is not None, "
            f"or try the machinery with --device cpu{interpreted}"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CannotRun(f"device is {device}, but torch sees {torch.cuda.device_count()}")
    found = backends._REGISTRY[name]
    for why in (found.missing(), *(found.refuses(device, dtype) for dtype in dtypes)):
        if why is not None:
            raise CannotRun(f"backend {name!r} cannot run here: {why}")
    return name


def selfcheck(
    device: torch.device | str = "cuda",
    backend: str | None = None,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    operators: bool = True,
    seconds: float | None = None,
    keep: bool = True,
    progress: Progress = lambda done, total, what: None,
) -> Record:
    """Checks and times one backend on `device`.

    Args:
        device: a CUDA device, or the CPU.
        backend: cuda, cpu or triton; None: that of the device's type.
        shapes: (M, N, K, r) of the timed points; None: SHAPES["default"] on CUDA, "small" on a CPU.
        dtypes: of x; None: bfloat16 and float16 on CUDA, of triton float32 too; float32 on a CPU.
        operators: whether each operator is checked too, and not the timed points alone.
        seconds: after which no further point is begun; None: all are measured.
        keep: whether the verdict becomes the user's, and is used from the next call on.
        progress: told what is next.

    Returns:
        What was found: `Record.wrong()` names what is not right.

    Raises:
        CannotRun: there is nothing to check here. Others: as `store`.
    """
    device = torch.device(device)
    dtypes = list(dtypes or default_dtypes(device, backend))
    name = backend_of(device, dtypes, backend)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    shapes = default_shapes(device) if shapes is None else shapes
    jobs = list(itertools.product(dtypes, shapes, (0.0, DROPOUT)))
    first = op_checks.count(dtypes, name) if operators else 0
    total = first + len(jobs)
    end = time.monotonic() + (seconds if seconds is not None else float("inf"))
    checks: list[Check] = []
    points: list[Point] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        for found in op_checks.run(name, device, dtypes) if operators else ():
            checks.append(found)
            progress(len(checks), total, found.name)
        timer = timing.make_timer(device.type)
        for number, (dtype, shape, p) in enumerate(jobs, first):
            if time.monotonic() > end:
                break
            progress(number, total, "M={} N={} K={} r={}".format(*shape))
            about: op_checks.About = (
                op_checks.WHOLE,
                "",
                str(dtype).removeprefix("torch."),
                p > 0,
                shape,
            )
            try:
                points += _points(name, device, dtype, shape, p, timer)
            except torch.cuda.OutOfMemoryError:
                checks.append(Check(*about, NOT_SERVED, None, "it does not fit into memory"))
            except Exception as error:  # as in op_checks.check
                checks.append(op_checks.failed(about, error))
    progress(total, total, "done")
    here = machines.of(device, name)
    record = Record(records.now(), name, here, tuple(checks), tuple(points))
    if keep:
        store(record)
    return record


def store(record: Record) -> Path:
    """Makes the record the user's verdict, from the next call of this process on; its file.

    Raises:
        verdicts.Untrusted: the cache folder is not the user's own. OSError: it cannot be written.
    """
    path = verdicts.save(record)
    dispatch.reload()
    return path


def _points(
    name: str, device: torch.device, dtype: torch.dtype, shape: Shape, p: float, timer: Callable
) -> Iterator[Point]:
    """The point of each pass at one shape."""
    problem = op_checks.make(shape, dtype, p, device, bias=False, on=device)
    right = _right(problem, name, device)
    problem = replace(problem, seed=None)  # each call draws one, as in training
    for of_pass in PASSES:
        calls = {which: _call(problem, which, of_pass) for which in (name, "composed")}
        for call in calls.values():
            for _ in range(timing.WARM_UP_CALLS[device.type]):
                call()
        timed = timing.interleave(calls, timer, ROUNDS, SECONDS)
        ours, composed = timed[name].median_ms, timed["composed"].median_ms
        kind = str(dtype).removeprefix("torch.")
        yield Point(*shape, p > 0, kind, of_pass, ours, composed, right)


def _right(problem: Problem, name: str, device: torch.device) -> bool:
    """Whether the step holds to C1, y and dx at rows of the first and last tiles and between."""
    m = problem.x.shape[0]
    rows = torch.linspace(0, m - 1, min(m, SAMPLED_ROWS), device=device).long()
    got: Results = problem.step(name)
    got |= {"y": got["y"][rows], "x": got["x"][rows]}
    exact = criterion.oracle(problem, rows)
    dtype = problem.x.dtype
    used = criterion.usage(exact, got, dtype, eager_like=backends.eager_like(name, dtype))
    return all(value <= 1 for value in used.values())


def _call(problem: Problem, name: str, of_pass: str) -> Callable[[], object]:
    """What is timed: with gradients of x, A and B for training, under no_grad for forward."""
    training = of_pass == "training"
    given = (problem.x, problem.lora_a, problem.lora_b)
    x, a, b = (t.detach().requires_grad_(training) for t in given)
    dy = problem.dy

    def forward():
        return fused_lora_linear(
            x, problem.weight, a, b, scaling=problem.scaling, dropout_p=problem.dropout_p,
            backend=name,
        )  # fmt: skip

    def alone():
        with torch.no_grad():
            return forward()

    def step():
        return torch.autograd.grad(forward(), (x, a, b), dy)

    return step if training else alone

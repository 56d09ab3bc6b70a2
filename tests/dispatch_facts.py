"""Made-up machines, points and records, for tests of the automatic choice without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from lora_kernels import dispatch
from lora_kernels.machine import Machine
from lora_kernels.records import Check, Record
from lora_kernels.shape_classes import PASSES, Call, Point

SOURCES = "5" * 64
GPU = Machine("NVIDIA Test 1", "9.0", "2.13.0", "13.0", "580.1", "0.1.0", SOURCES)
OF_TRITON = GPU._replace(sources="7" * 64)  # the same device, as Triton's evidence names it
BOX = ((1024, 4096), (1024, 4096), (1024, 4096), (16, 64))
INSIDE = Call(2048, 2048, 4096, 32, False, True)
EMPTY: dict = {"schema": dispatch.SCHEMA, "rows": [], "slower": []}
DATE = "2026-01-02T03:04:05+00:00"
RIGHT = Check("forward", "", "bfloat16", False, (1, 2, 3, 4), "right", 0.5)
WRONG = Check("forward_as", "decode", "bfloat16", False, (1, 2, 3, 4), "wrong", None, "why")


def points(
    ratio: Callable[..., float] = lambda *sizes: 0.5,
    *,
    box: tuple = BOX,
    dtype: str = "bfloat16",
    passes: Iterable[str] = PASSES,
    dropouts: Iterable[bool] = (False, True),
    right: bool = True,
) -> list[Point]:
    """The corners of a box; `ratio(m, n, k, r)` of composed's 2 ms is what ours takes."""
    return [
        Point(*sizes, dropped, dtype, of_pass, 2.0 * ratio(*sizes), 2.0, right)
        for sizes, dropped, of_pass in itertools.product(itertools.product(*box), dropouts, passes)
    ]


def record(
    found: Iterable[Point] = (),
    checks: Iterable[Check] = (RIGHT,),
    machine: Machine = GPU,
    backend: str = "cuda",
) -> Record:
    return Record(DATE, backend, machine, tuple(checks), tuple(found))


def on_gpu(device: object, backend: str = "cuda") -> Machine:
    """In place of `machine.of`."""
    return OF_TRITON if backend == "triton" else GPU

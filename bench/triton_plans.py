"""What `bench.tune_triton` tries of a kernel, on what, and whether it is right.

A plan is improved field by field, along the AXES of its kernel: the plans of an axis differ from
the best so far in the fields of that axis alone, so a row costs the sum of the axes' lengths, not
their product, most of it compilation. Fields that only make sense together are one axis.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from lora_kernels import criterion, op_checks
from lora_kernels.triton_kernels import configs, device
from lora_kernels.triton_kernels.configs import Config
from lora_kernels.triton_kernels.down_proj import down_proj
from lora_kernels.triton_kernels.fused_gemm import fused_gemm
from lora_kernels.triton_kernels.weight_grad import (
    down_and_weight_grad,
    parts_are_cheap,
    weight_grad,
)

# A micro-batch of one sequence of 2048 tokens and one of 8192 are what is trained; 4096 and 14336
# are the widths of a model of 8e9 parameters, and each order of the two is one of its layers: few
# columns of weight and long sums, and the reverse. 16 and 64 are usual ranks, 128 a large one.
ROWS, WIDTHS, RANKS = (2048, 8192), ((4096, 4096), (14336, 4096), (4096, 14336)), (16, 64, 128)
FEW_ROWS, WIDE_RANKS = (32, 512), (256,)  # for rows of the table that hold none of those
TINY_ROWS, TINY_WIDTHS, TINY_RANKS = (16, 64, 96), ((64, 96),), (16,)  # for the interpreter
# M, N, K of what is checked: multiples of 16, as whatever is timed, and of no tile.
CHECKED, TINY_CHECKED = (400, 528, 592), (80, 80, 96)
DROPOUT = 0.1

# Bytes of shared memory that every device of a family has. Others of the same family may have
# less than the one that measures; where none has, Triton itself refuses what does not fit.
LEAST_SHARED = {"sm80": 99 << 10, "amd": 64 << 10}

Axis = tuple[tuple[str, ...], tuple[tuple, ...]]  # fields, their values
STAGES: Axis = (("stages",), ((2,), (3,), (4,), (5,)))
GEMM: tuple[Axis, ...] = (
    (("kind",), (("grid",), ("persistent",), ("descriptors",))),
    STAGES,
    (("group",), ((1,), (4,), (8,), (16,))),
    (("rank",), ((16,), (32,), (64,))),
)
AXES: dict[tuple[str, str], tuple[Axis, ...]] = {  # by kernel and width
    ("down_proj", "16"): (
        (("rows", "depth", "warps"), (
            (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 64, 8), (64, 128, 4), (64, 128, 8),
            (128, 64, 4), (128, 64, 8), (128, 128, 8),
        )),
        STAGES,
    ),
    ("down_proj", "32"): (
        (("rows", "depth", "warps"), (
            (16, 64, 4), (32, 32, 4), (32, 32, 8), (32, 64, 4), (32, 64, 8), (64, 32, 4),
            (64, 32, 8),
        )),
        STAGES,
    ),
    ("fused_gemm", "16"): (
        (("rows", "cols", "depth", "warps"), (
            (16, 64, 128, 4), (16, 128, 64, 4), (32, 64, 128, 4), (64, 64, 64, 4),
            (64, 64, 128, 4), (64, 128, 32, 4), (64, 128, 64, 4), (64, 256, 64, 8),
            (128, 64, 64, 4), (128, 128, 32, 4), (128, 128, 32, 8), (128, 128, 64, 4),
            (128, 128, 64, 8), (128, 256, 32, 8), (128, 256, 64, 8), (256, 128, 64, 8),
        )),
        *GEMM,
    ),
    ("fused_gemm", "32"): (
        (("rows", "cols", "depth", "warps"), (
            (32, 64, 32, 4), (64, 64, 16, 4), (64, 64, 16, 8), (64, 64, 32, 8), (64, 128, 16, 8),
            (128, 64, 16, 8), (128, 128, 16, 8),
        )),
        *GEMM,
    ),
    ("weight_grad", "16"): (
        (("rows", "cols", "warps"), (
            (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (64, 256, 8),
            (128, 64, 4), (128, 128, 8),
        )),
        STAGES,
    ),
    ("weight_grad", "32"): (
        (("rows", "cols", "warps"), ((16, 64, 4), (32, 32, 4), (32, 64, 4), (32, 64, 8),
                                     (32, 128, 8), (64, 64, 8))),
        STAGES,
    ),
    ("down_and_weight_grad", "16"): (
        (("rows", "cols", "warps"), (
            (128, 64, 8), (128, 128, 8), (256, 32, 4), (256, 32, 8), (256, 64, 4), (256, 64, 8),
            (256, 128, 8),
        )),
        STAGES,
    ),
    ("down_and_weight_grad", "32"): (
        (("rows", "cols", "warps"), ((64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 32, 8))),
        STAGES,
    ),
}  # fmt: skip
PROGRAMS = (1, 2, 4)  # a multiprocessor; of the kernels that split sums


class Shape(NamedTuple):
    m: int
    n: int
    k: int
    r: int


def shapes(kernel: str, low: int, up_to: int | None, present: Config, tiny: bool) -> list[Shape]:
    """The problems whose size is above `low` and up to `up_to`: what a row of the table holds."""
    of_rows, widths, ranks = (TINY_ROWS, TINY_WIDTHS, TINY_RANKS) if tiny else (ROWS, WIDTHS, RANKS)

    def held(sizes: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
        def inside(size: int) -> bool:
            return low < size and (up_to is None or size <= up_to)

        return tuple(filter(inside, sizes)) or tuple(filter(inside, more))

    if kernel == "fused_gemm":
        of_rows = held(of_rows, FEW_ROWS)
    else:
        ranks = held(ranks, WIDE_RANKS)
    if kernel == "down_and_weight_grad":  # what `one_read` lets through
        found = itertools.product(ranks, of_rows, widths)
        fp32 = 4  # its parts are cheap for more ranks than those of 16 bits
        served = ((r, m, nk) for r, m, nk in found if parts_are_cheap(present, m, nk[0], r, fp32))
        return [Shape(m, n, k, r) for r, m, (n, k) in served]
    return [Shape(m, n, k, r) for r in ranks for m in of_rows for n, k in widths]


def plans(
    kernel: str, axis: Axis, best: Config, present: Config, here: torch.device
) -> list[Config]:
    """Those of an axis, for `best` as it is in the other fields and but for itself."""
    fields, values = axis
    found = [replace(best, **dict(zip(fields, value, strict=True))) for value in values]
    if not device.has_descriptors(here):
        found = [config for config in found if config.kind != "descriptors"]
    if kernel == "down_and_weight_grad":  # fewer would take calls away from `one_read`
        found = [config for config in found if config.rows >= present.rows]
    return [config for config in dict.fromkeys(found) if config != best]


def axes(kernel: str, width: str, here: torch.device) -> list[Axis]:
    """What is tried of a kernel on a device, in this order."""
    found = list(AXES[kernel, width])
    if kernel != "fused_gemm":
        count = device.multiprocessors(here)
        found.append((("programs",), tuple((factor * count,) for factor in PROGRAMS)))
    return found


# ---- the calls -----------------------------------------------------------------------------------


def calls(kernel: str, p: op_checks.Problem, h: Tensor, dh: Tensor) -> dict[str, Callable]:
    """By what they give, in names of `criterion.oracle`: a forward and a backward pass's launches.

    The mask is on x alone, so a kernel is called with it and without.
    """
    if kernel == "down_proj":
        return {
            "h": lambda: down_proj(p.x, p.lora_a, *p.drop, p.scaling),
            "dh": lambda: down_proj(p.dy, p.lora_b.t(), None, 0, p.scaling),
        }
    if kernel == "fused_gemm":
        return {
            "y": lambda: fused_gemm(p.x, p.weight, h, p.lora_b, p.bias, None, 0, 1.0),
            "x": lambda: fused_gemm(p.dy, p.weight.t(), dh, p.lora_a.t(), None, *p.drop, 1.0),
        }
    if kernel == "weight_grad":
        return {
            "lora_a": lambda: weight_grad(dh, p.x, *p.drop, 1.0, False, False),
            "lora_b": lambda: weight_grad(h, p.dy, None, 0, 1.0, False, True),
        }
    one_read = functools.partial(down_and_weight_grad, h, p.dy, p.lora_b.t(), p.scaling, 1.0, False)
    return {"dh,lora_b,bias": lambda: one_read(True, True)}


def make(shape: Shape, dtype: torch.dtype, here: torch.device) -> op_checks.Problem:
    """Operands of one layer with a mask on x that is not a window's, drawn on the device."""
    problem = op_checks.make(shape, dtype, DROPOUT, here, on=here)
    assert problem.seed is not None
    return replace(problem, seed=problem.seed[:2])


class Checks:
    """Whether plans of one width are right, by C1 on problems smaller than what is timed."""

    def __init__(self, dtype: torch.dtype, here: torch.device):
        self.dtype, self.here = dtype, here
        self._known: dict[tuple, str | None] = {}
        self._exact: dict[int, tuple[criterion.Oracle, dict[str, dict[str, Callable]]]] = {}

    def objection(self, kernel: str, what: str, config: Config, r: int) -> str | None:
        """Why the call that gives `what` cannot be timed with a plan; None if it can."""
        about = kernel, what, config, r
        if about not in self._known:
            self._known[about] = self._judge(*about)
        return self._known[about]

    def _judge(self, kernel: str, what: str, config: Config, r: int) -> str | None:
        exact, of_kernels = self._problem(r)
        with shared_memory() as used, configs.using(kernel, config):
            try:
                got = of_kernels[kernel][what]()
            except Exception as error:  # of any kind: what one plan does must not end the run
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        least = LEAST_SHARED.get(device.family(self.here))
        if least is not None and max(used, default=0) > least:
            return (
                f"{max(used)} bytes of shared memory, but some devices of this family have {least}"
            )
        results = dict(zip(what.split(","), got if isinstance(got, tuple) else (got,), strict=True))
        past = criterion.usage(exact, results, self.dtype)
        bad = [name for name, value in past.items() if not value <= 1]
        return f"{', '.join(bad)} past the bound of C1" if bad else None

    def _problem(self, r: int) -> tuple[criterion.Oracle, dict[str, dict[str, Callable]]]:
        if r not in self._exact:
            sizes = TINY_CHECKED if self.here.type == "cpu" else CHECKED
            problem = make(Shape(*sizes, r), self.dtype, self.here)
            exact = criterion.oracle(problem)
            h, dh = (exact.value[name].to(self.dtype) for name in ("h", "dh"))
            of_kernels = {kernel: calls(kernel, problem, h, dh) for kernel in configs.KERNELS}
            self._exact[r] = exact, of_kernels
        return self._exact[r]


@contextlib.contextmanager
def shared_memory() -> Iterator[list[int]]:
    """Bytes of shared memory of each kernel that is launched meanwhile; none in the interpreter."""
    run, used = JITFunction.run, []

    def watched(self, *args, **kwargs):
        compiled = run(self, *args, **kwargs)
        used.append(compiled.metadata.shared)
        return compiled

    JITFunction.run = watched
    try:
        yield used
    finally:
        JITFunction.run = run

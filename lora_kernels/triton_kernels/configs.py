"""Tile plans by family of devices, width of loads and class of shape: configs.json, read once.

Nothing is timed at run time, and nothing but these three decides, so every rank of a distributed
job takes the same plan. `python -m bench.tune_triton` measures the table anew on a GPU.

A width is that of elements in bits, "scattered" where they are loaded one by one: rows of x that
are not contiguous, or whose length or distance 16 does not divide. A row holds up to its `up_to`, M
for fused_gemm, the rank r for the others. `programs` is how many a kernel should have: below it a
sum is split, or a smaller tile taken. No rows: the kernel is not used there. "origin" says of each
family where its rows come from.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import device
from .dropout import OFF_BLOCKS

TABLE = Path(__file__).with_name("configs.json")
SCHEMA = 2
KERNELS = ("down_proj", "fused_gemm", "weight_grad", "down_and_weight_grad")
KINDS = ("grid", "persistent", "descriptors")  # of fused_gemm
MOST_SPLITS = 32  # partial results that are summed afterwards
LEAST_STEPS = 4  # tiles of a sum that is split


def cdiv(length: int, block: int) -> int:
    """How many blocks a length has; triton.cdiv costs the host more than a lookup of a plan."""
    return -(-length // block)


@dataclass(frozen=True)
class Config:
    """One launch: rows x cols of a tile (rows x rank in down_proj), depth of a step."""

    rows: int
    cols: int
    depth: int
    rank: int
    warps: int
    stages: int
    programs: int
    kind: str = "grid"
    group: int = 8  # row blocks that share the columns of weight in L2

    def split(self, length: int, others: int, step: int) -> tuple[int, int]:
        """(length of a part, number of parts) of a sum that `others` programs would do alone."""
        most = min(MOST_SPLITS, max(length // (LEAST_STEPS * step), 1))
        wanted = min(max(self.programs // others, 1), most)
        span = max(cdiv(length, wanted * step), 1) * step
        return span, max(cdiv(length, span), 1)


_TRIALS: dict[str, Config] = {}  # by kernel, in place of the table


@contextlib.contextmanager
def using(kernel: str, config: Config) -> Iterator[None]:
    """Every launch of a kernel takes `config`, in this process: to measure it before it is a row.

    `lookup` remembers nothing of it.
    """
    outer = _TRIALS.copy()
    _TRIALS[kernel] = config
    try:
        yield
    finally:
        _TRIALS.clear()
        _TRIALS.update(outer)


def serves(kernel: str, mask: int, *operands: Tensor) -> bool:
    """Whether the table has plans for such operands."""
    return kernel in _TRIALS or is_used(kernel, *_class_of(mask, operands))


def of(kernel: str, size: int, mask: int, *operands: Tensor) -> Config:
    """The plan of a launch. `size` is what rows of the table go by; `operands`, the large ones."""
    if kernel in _TRIALS:
        return _TRIALS[kernel]
    others = [t.shape[0] for t in operands[1:]]  # rows of weight: columns of y
    return lookup(kernel, *_class_of(mask, operands), size, *others)


def _class_of(mask: int, operands: tuple[Tensor, ...]) -> tuple[str, str]:
    """(family, width) of a launch."""
    x, *weights = operands
    width = str(x.element_size() * 8)
    turned = (w if w.stride(1) == 1 else w.t() for w in weights)
    if mask == OFF_BLOCKS.value or not all(map(device.loads_vectors, (x, *turned))):
        width += " scattered"
    return device.family(x.device), width


def is_used(kernel: str, of_family: str, width: str) -> bool:
    return len(load()[kernel][of_family][width]) > 0


@functools.lru_cache(maxsize=4096)
def lookup(kernel: str, of_family: str, width: str, size: int, n: int = 0) -> Config:
    """The first row of the table that holds a size; the last holds every size.

    With `n`, the columns of y, one of smaller tiles if too few programs would run.
    """
    rows = load()[kernel][of_family][width]
    if not rows:
        raise LookupError(f"{TABLE.name}: {kernel} has no plan for {of_family}, {width}")
    held = next(i for i, row in enumerate(rows) if row["up_to"] is None or size <= row["up_to"])
    plans = [plan_of(row) for row in rows[: held + 1]]
    for plan in reversed(plans):
        if n == 0 or cdiv(size, plan.rows) * cdiv(n, plan.cols) >= plan.programs:
            return plan
    return plans[0]


def plan_of(row: dict[str, Any]) -> Config:
    """What a row of the table says but for the sizes that it holds."""
    return Config(**{name: value for name, value in row.items() if name != "up_to"})


@functools.cache
def load() -> dict[str, Any]:
    """configs.json of this package."""
    table = json.loads(TABLE.read_text())
    if table["schema"] != SCHEMA:
        raise RuntimeError(f"{TABLE}: schema {table['schema']}, expected {SCHEMA}; reinstall")
    return table

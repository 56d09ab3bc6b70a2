"""Tile plans by family of devices, width of loads and class of shape: configs.json, read once.

Nothing is timed at run time, and nothing but these three decides, so every rank of a distributed
job takes the same plan. `python -m bench.tune_triton` measures the table anew on a GPU.

A width is that of elements in bits, "scattered" where they are loaded one by one: rows or a length
of rows that 16 bytes do not divide. A row holds up to its `up_to`, M for fused_gemm, the rank r for
the others. `programs` is how many a kernel should have before it stops splitting its sums. "origin"
says of each family where its rows come from.
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
        wanted = min(cdiv(self.programs, others), most)
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


def of(kernel: str, size: int, mask: int, *operands: Tensor) -> Config:
    """The plan of a launch. `size` is what rows of the table go by; `operands`, the large ones."""
    if kernel in _TRIALS:
        return _TRIALS[kernel]
    x = operands[0]
    width = str(x.element_size() * 8)
    if mask == OFF_BLOCKS.value or not all(map(device.loads_vectors, operands)):
        width += " scattered"
    return lookup(kernel, device.family(x.device), width, size)


@functools.lru_cache(maxsize=4096)
def lookup(kernel: str, of_family: str, width: str, size: int) -> Config:
    """The first row of the table that holds a size; the last holds every size."""
    rows = load()[kernel][of_family][width]
    row = next(row for row in rows if row["up_to"] is None or size <= row["up_to"])
    return plan_of(row)


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

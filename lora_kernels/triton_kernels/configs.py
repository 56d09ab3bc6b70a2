"""Tile plans by family of devices, width of elements and class of shape: configs.json, read once.

Nothing is timed at run time, and nothing but these three decides, so every rank of a distributed
job takes the same plan. `python -m bench.tune_triton` measures the table anew on a GPU.

A row holds up to its `up_to`: M for fused_gemm, the rank r for the others. `programs`
is how many programs a kernel should have at least before it stops splitting its sums.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .device import family

TABLE = Path(__file__).with_name("configs.json")
SCHEMA = 1
KERNELS = ("down_proj", "fused_gemm", "weight_grad", "down_and_weight_grad")
KINDS = ("grid", "persistent", "descriptors")  # of fused_gemm
MOST_SPLITS = 32  # partial results that are summed afterwards
LEAST_STEPS = 4  # tiles of a sum that is split


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

    def split(self, length: int, others: int, step: int = 0) -> tuple[int, int]:
        """(length of a part, number of parts) of a sum that `others` programs would do alone."""
        step = step or self.depth
        wanted = min(-(-self.programs // others), MOST_SPLITS, max(length // (LEAST_STEPS * step), 1))
        span = -(-length // (wanted * step)) * step
        return max(span, step), max(-(-length // max(span, step)), 1)


def down_proj(x: Tensor, r: int) -> Config:
    return lookup("down_proj", family(x.device), x.element_size() * 8, r)


def fused_gemm(x: Tensor, m: int) -> Config:
    return lookup("fused_gemm", family(x.device), x.element_size() * 8, m)


def weight_grad(x: Tensor, r: int) -> Config:
    return lookup("weight_grad", family(x.device), x.element_size() * 8, r)


def down_and_weight_grad(x: Tensor, r: int) -> Config:
    return lookup("down_and_weight_grad", family(x.device), x.element_size() * 8, r)


@functools.lru_cache(maxsize=4096)
def lookup(kernel: str, of_family: str, bits: int, size: int) -> Config:
    """The first row of the table that holds a size; the last holds every size."""
    rows = load()[kernel][of_family][str(bits)]
    row = next((row for row in rows if row["up_to"] is None or size <= row["up_to"]))
    return Config(**{name: value for name, value in row.items() if name != "up_to"})


@functools.cache
def load() -> dict[str, Any]:
    """configs.json of this package."""
    table = json.loads(TABLE.read_text())
    if table["schema"] != SCHEMA:
        raise RuntimeError(f"{TABLE}: schema {table['schema']}, expected {SCHEMA}; reinstall")
    return table


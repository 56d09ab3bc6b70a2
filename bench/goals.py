"""What the kernels are to reach on an H100, and what a device's results say of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import bench_gemm, traffic

HEADER = ("goal", "at most", "at least", "measured, the worst", "")
GEMMS, STEPS = ("gemm.json", "sweep.json"), ("layers.json", "steps.json")


class Goal(NamedTuple):
    """A bound that every number of one kind keeps."""

    about: str
    files: tuple[str, ...]
    values: Callable[[dict], Iterator[float]]  # of a file's content
    at_most: float | None = None
    at_least: float | None = None

    def worst(self, folder: Path) -> float | None:
        """Of a device's results; None where they have no such number."""
        paths = [folder / file for file in self.files if (folder / file).exists()]
        found = [v for path in paths for v in self.values(json.loads(path.read_text()))]
        return (max if self.at_least is None else min)(found, default=None)

    def line(self, folder: Path) -> tuple[str, ...]:
        bounds = ["" if b is None else f"{b:g}" for b in (self.at_most, self.at_least)]
        worst = self.worst(folder)
        if worst is None:
            return self.about, *bounds, "", "not measured"
        met = worst <= self.at_most if self.at_least is None else worst >= self.at_least
        return self.about, *bounds, f"{worst:.3f}", "met" if met else "**missed**"


def _rows(result: dict, name: str, **about) -> Iterator[dict]:
    """Of every table whose keys are `about`, the rows of one contender."""
    for table in result["groups"]:
        if all(table[key] == value for key, value in about.items()):
            yield from (row for row in table["rows"] if row["name"] == name)


def _ratio(name: str, key: str, **about) -> Callable[[dict], Iterator[float]]:
    return lambda result: (row[key] for row in _rows(result, name, **about) if row.get(key))


def _added(low: int, high: int) -> Callable[[dict], Iterator[float]]:
    """The faster form's time over the plain GEMM's, of ranks from `low` to `high`."""

    def values(result: dict) -> Iterator[float]:
        for table in result["groups"]:
            row = bench_gemm.faster(table)
            if low <= table["rank"] <= high and row is not None:
                yield row["over_plain"]

    return values


def _over_addmm(result: dict) -> Iterator[float]:
    """The automatic choice's time over addmm's, where it chooses our CUDA kernels."""
    for table in result["groups"]:
        times = {row["name"]: row.get("median_ms") for row in table["rows"]}
        if table["automatic"] == "cuda" and times.get("addmm"):
            yield times["cuda"] / times["addmm"]


def _published(suite: dict) -> Iterator[float]:
    """DRAM bytes of a step over those that LoRAFusion publishes."""
    for stage in suite["stages"]:
        for row in stage.get("summary", {}).get("rows", ()) if stage["name"] == "dram" else ():
            if row["kernel"] == traffic.STEP and row["name"] == "cuda":
                yield row["over_published"]


def _step(width: int, most: float) -> Goal:
    about = f"forward and backward over the frozen linear's, K = N = {width}"
    values = _ratio("cuda", "ratio_to_frozen", n=width, k=width, mode="fwd+bwd")
    return Goal(about, STEPS, values, most)


def _peft(n: int, k: int, least: float) -> Goal:
    values = _ratio("cuda", "speedup_over_peft", n=n, k=k, dropout=0.1, mode="fwd+bwd")
    about = f"PEFT's formula over ours, {k} -> {n}, dropout 0.1"
    return Goal(about, STEPS, values, at_least=least)


GOALS = (
    Goal("our GEMM without LoRA over the vendor's", GEMMS, _ratio("plain", "over_vendor"), 1.05),
    Goal("LoRA in the forward GEMM, r <= 32", GEMMS, _added(1, 32), 1.02),
    Goal("LoRA in the forward GEMM, r = 64", GEMMS, _added(64, 64), 1.03),
    _step(8192, 1.05), _step(4096, 1.08),
    _peft(4096, 4096, 1.44), _peft(5120, 5120, 1.36), _peft(8192, 8192, 1.23),
    _peft(1024, 4096, 1.9),
    Goal("our kernels over addmm, where chosen by themselves", STEPS, _over_addmm, 1.0),
    Goal("DRAM bytes of a step over the published", ("suite.json",), _published, 1.0),
    Goal("a few rows over the vendor's frozen linear", ("decode.json",),
         _ratio("decode", "over_vendor"), 1.1),
)  # fmt: skip

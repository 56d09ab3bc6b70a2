"""Which calls a measurement speaks for: few, coarse classes of shapes, and when one is won.

A class is a box between neighbouring EDGES of M, N, K and r, both ends included, with or without
dropout, in one dtype, for one pass: "training" is forward and backward, "forward" is alone, without
gradients. N and K in it are multiples of ALIGNED. It counts only if its 16 corners were measured,
and is won only if at every point measured in it, corner or not, the backend was right and its
median at most WON of composed's in the same run. Whatever lies in no such class is composed's.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

EDGES = {
    "m": (1, 16, 64, 256, 1024, 4096, 16384),
    "n": (256, 1024, 4096, 16384),
    "k": (256, 1024, 4096, 16384),
    "r": (4, 16, 64, 128, 256),
}
ALIGNED = 8  # elements: 16 bytes of 16-bit numbers; other widths are copied first
WON = 0.99  # what is within a hundredth of composed's median is no win
PASSES = ("forward", "training")

Range = tuple[int, int]
Kind = tuple[str, str, bool]  # dtype, pass, dropout


class Call(NamedTuple):
    """What the choice knows of a call: x [m, k], weight [n, k], rank r."""

    m: int
    n: int
    k: int
    r: int
    dropout: bool
    training: bool  # whether a backward pass will follow

    def __str__(self) -> str:
        return f"M={self.m} N={self.n} K={self.k} r={self.r} {_kind(self.dropout, self.training)}"


class Point(NamedTuple):
    """One measured call."""

    m: int
    n: int
    k: int
    r: int
    dropout: bool
    dtype: str  # "bfloat16"
    of_pass: str
    ours_ms: float  # medians of interleaved runs
    composed_ms: float
    right: bool  # by lora_kernels.criterion

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.composed_ms

    @property
    def won(self) -> bool:
        return self.right and self.ratio <= WON

    def __str__(self) -> str:
        return (
            f"{self.ours_ms:.4g} ms against composed's {self.composed_ms:.4g} ms at M={self.m} "
            f"N={self.n} K={self.k} r={self.r}"
        )


class Class(NamedTuple):
    """One class whose corners were measured, with the points in it."""

    dtype: str
    of_pass: str
    dropout: bool
    m: Range
    n: Range
    k: Range
    r: Range
    points: tuple[Point, ...]

    @property
    def kind(self) -> Kind:
        return self.dtype, self.of_pass, self.dropout

    def holds(self, call: Call) -> bool:
        """Whether it speaks for this call, which is of its kind."""
        return _inside(self, call)

    @property
    def won(self) -> bool:
        return all(point.won for point in self.points)

    @property
    def worst(self) -> Point:
        """The point at which ours did worst against composed."""
        return max(self.points, key=lambda point: point.ratio)

    def __str__(self) -> str:
        box = " ".join(
            f"{name} {low}..{high}"
            for name, (low, high) in zip("MNKr", (self.m, self.n, self.k, self.r), strict=True)
        )
        return f"{box} {self.dtype} {_kind(self.dropout, self.of_pass == 'training')}"


def classes(points: Iterable[Point]) -> list[Class]:
    """Every class whose corners are among these points, won or not, in a fixed order."""
    kinds: dict[Kind, dict[tuple[int, ...], Point]] = defaultdict(dict)
    for point in points:
        kinds[point.dtype, point.of_pass, point.dropout][point[:4]] = point
    found = []
    for kind, by_size in sorted(kinds.items()):
        for m, n, k, r in itertools.product(*map(itertools.pairwise, EDGES.values())):
            if all(corner in by_size for corner in itertools.product(m, n, k, r)):
                empty = Class(*kind, m, n, k, r, ())
                inside = tuple(p for _, p in sorted(by_size.items()) if _inside(empty, p))
                found.append(empty._replace(points=inside))
    return found


def _inside(box: Class, at: Call | Point) -> bool:
    return (
        box.m[0] <= at.m <= box.m[1]
        and box.n[0] <= at.n <= box.n[1]
        and box.k[0] <= at.k <= box.k[1]
        and box.r[0] <= at.r <= box.r[1]
        and at.n % ALIGNED == 0
        and at.k % ALIGNED == 0
    )


def _kind(dropout: bool, training: bool) -> str:
    return f"{'with' if dropout else 'without'} dropout, {'training' if training else 'forward'}"

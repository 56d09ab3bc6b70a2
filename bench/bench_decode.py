"""`python -m bench.bench_decode`: what LoRA adds to the frozen linear of few rows, as in decoding.

Reading W is all the time there is, so each call takes another copy of W, of so many that none is
still in a cache. Each table is one layer, rank and dropout, the forward pass alone; its contenders
run interleaved.

  vendor        the frozen linear, torch.mm into a buffer that exists: cuBLAS on CUDA
  plain         our kernels without LoRA: rank 0
  decode        our kernel for few rows: one launch
  two_launches  our down projection, then our GEMM, which adds the up projection
  addmm         lora_kernels.composed: the vendor's GEMMs, the up projection accumulated in place
  eager         PEFT's formula

`over vendor` is time over its, `GB/s` the bytes of W over the time, `over plain` what is added to
that contender's time. Results of ours are compared with composed's before they are timed; a wrong
one is an error and not timed. What cannot serve a call is left out, with the reason.
"""

from __future__ import annotations

import itertools
import math
import sys

import torch

from . import bench_gemm, contenders, report, shapes
from .shapes import Case, Shape

FORMS = ("decode", "two_launches")
RANKS = "16"
ROWS = (1, 16, 64)
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # N, K
COLD_BYTES = 256 << 20  # more than any cache holds
COLUMNS = {
    "median_ms": bench_gemm.COLUMNS["median_ms"],
    "iqr_ms": bench_gemm.COLUMNS["iqr_ms"],
    "weight_gb_per_s": ("GB/s", report.digits),
    "over_plain": bench_gemm.COLUMNS["over_plain"],
    "over_vendor": bench_gemm.COLUMNS["over_vendor"],
    "samples": bench_gemm.COLUMNS["samples"],
}


def default_cases(device: str, rank: int) -> list[Case]:
    """CUDA: LAYERS. CPU: MiniLM's layers, so that everything but the speed can be tried."""
    dtype, layers = ("bf16", LAYERS)
    if device == "cpu":
        dtype, layers = ("fp32", tuple(dict.fromkeys(shapes.preset("minilm").values())))
    return [Case(Shape(f"{n}x{k}", m, n, k), dtype, rank) for n, k in layers for m in ROWS]


class Layer(bench_gemm.Layer):
    """One layer, whose weight is another copy at every look."""

    FORMS = FORMS
    COLUMNS = COLUMNS

    def __init__(self, problem: contenders.Problem, p: float):
        size = problem.weight.numel() * problem.weight.element_size()
        copies = math.ceil(COLD_BYTES / max(size, COLD_BYTES // 64))
        weights = [problem.weight, *(problem.weight.clone() for _ in range(copies - 1))]
        self._weights = itertools.cycle(weights)
        super().__init__(problem, p)

    @property
    def weight(self) -> torch.Tensor:
        return next(self._weights)

    @weight.setter
    def weight(self, _: torch.Tensor) -> None:
        """The copies are there already."""


@torch.no_grad()
def main() -> int:
    args = bench_gemm.parse("decode", __doc__, RANKS)
    served = bench_gemm.built(args.device)
    return bench_gemm.run("decode", args, served, Layer, default_cases)


if __name__ == "__main__":
    sys.exit(main())

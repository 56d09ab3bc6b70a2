"""`python -m bench.bench_backward`: what the gradients of A and B add to the GEMM of dx.

Each table is one layer, rank and dropout, the gradients of x, A and B; its contenders run
interleaved.

  vendor      dx of the frozen linear, torch.mm into a buffer that exists: cuBLAS on CUDA
  plain       our kernel's, without LoRA
  passes      all three gradients: a pass over dy, one over x, and dx with the LoRA term between
  one_grid    all three in one launch
  dy_x_alone  of these passes, dB, dh and dA
  x_alone     dA alone: the time between these two is the dy pass
  dx_alone    dx with the LoRA term
  composed    lora_kernels.composed: the vendor's GEMMs
  eager       PEFT's formula by autograd, of a graph that is kept

`over plain` is what is added to its time, `by the model` what the plan expects of that; `over
vendor` is time over its. FLOP/s counts the frozen GEMM of dx alone, so that rows compare. Results
of ours are compared with composed's before they are timed; a wrong one is an error and not timed.
What cannot serve a call is left out, with the reason. On a CPU, and where our kernels are not
built, vendor, composed and eager remain. --tile-n and --group time plain, passes and one_grid once
for each pair, and `over plain` is over the plain of that pair.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch

from lora_kernels import composed

from . import bench_gemm, contenders
from .bench_gemm import OPS, Ours, suffix

FORMS = ("passes", "one_grid")
OURS = ("plain", *FORMS)
PARTS = ("dy_x_alone", "x_alone", "dx_alone")
RANKS = "16,64,128"
BUILT = ("backward_as", "backward_plan", "fused_gemm", "weight_grad")
NARROW = (False, False)
ALL = (True, True, True, False)  # no bias: what is asked for is the gradients of x, A and B


class Layer(bench_gemm.Layer):
    """The same operands, and those that the forward pass and the loss leave."""

    def __init__(self, problem: contenders.Problem, p: float):
        super().__init__(problem, p)
        self.dy, self.out = problem.dy, torch.empty_like(self.x)
        self.drop = (self.seed, self.threshold)
        self.h = composed.down_proj(self.x, self.a, *self.drop, contenders.SCALING)
        self.dh = composed.down_proj(self.dy, self.b.t(), None, 0, contenders.SCALING)
        with torch.enable_grad():
            self.inputs = tuple(t.detach().requires_grad_() for t in (self.x, self.a, self.b))
            x, a, b = self.inputs
            self.y = contenders.peft_formula(x, self.weight, a, b, p)

    def vendor(self) -> torch.Tensor:
        return torch.mm(self.dy, self.weight, out=self.out)

    def others(self) -> dict[str, Callable]:
        return {"composed": self.composed, "eager": self.eager}

    def _lora(self) -> tuple:
        scales = (contenders.SCALING, 1.0)
        return (self.dy, self.x, self.weight, self.a, self.b, self.h, *self.drop, *scales, *NARROW)

    def composed(self) -> tuple[torch.Tensor, ...]:
        return composed.backward(*self._lora(), *ALL)

    def eager(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.y, self.inputs, self.dy, retain_graph=True)

    def exact(self) -> dict[str, tuple[torch.Tensor, ...]]:
        dx, da, db, _ = self.composed()
        found = {"lora": (dx, da, db), "dx": (dx,), "da": (da,), "dadb": (da, db)}
        return {"frozen": (self.vendor(),), **found}

    def _plan(self, form: str, tile_n: int, group: int) -> Callable[[], str]:
        r = self.a.shape[0] if form else 0
        operands = (self.x, self.weight, self.a[:r], self.b[:, :r], self.seed if form else None)
        return functools.partial(OPS.backward_plan, *operands, form, tile_n, group)

    def ours(self, tile_n: int, group: int) -> Iterator[Ours]:
        a, b, h = self.a[:0], self.b[:, :0], self.h[:, :0]
        frozen = (self.dy, self.x, self.weight, a, b, h, None, 0, 1.0, 1.0, *NARROW)
        for form in ("", *FORMS):
            operands = (*self._lora(), *ALL) if form else (*frozen, True, False, False, False)
            yield Ours(
                (form or "plain") + suffix(tile_n, group),
                functools.partial(OPS.backward_as, *operands, form, tile_n, group),
                self._plan(form, tile_n, group),
                "lora" if form else "frozen",
            )
        up = (self.dy, self.weight.t(), self.dh, self.a.t(), None, *self.drop, 1.0)
        both = (*self._lora(), False, True, True, False, "passes", 0, 0)
        for name, call, exact in (
            ("dy_x_alone", functools.partial(OPS.backward_as, *both), "dadb"),
            (
                "x_alone",
                functools.partial(OPS.weight_grad, self.dh, self.x, *self.drop, 1.0, False, False),
                "da",
            ),
            ("dx_alone", functools.partial(OPS.fused_gemm, *up), "dx"),
        ):
            yield Ours(name, call, self._plan("passes", 0, 0), exact, part=True)


@torch.no_grad()
def main() -> int:
    args = bench_gemm.parse("backward", __doc__, RANKS)
    return bench_gemm.run("backward", args, bench_gemm.built(args.device, BUILT), Layer)


if __name__ == "__main__":
    sys.exit(main())

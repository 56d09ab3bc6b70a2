"""The backward pass on Hopper, in the emulator and on a device."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulator.suite import SCHEDULES
from test_forward import DTYPES, SCALE, SEEDS, SHAPES, THRESHOLD, VIEWS, bits
from test_kernels import UNIT

from lora_kernels import dropout

UP = 0.75  # of the up projection: scale of dA, dB and of the LoRA term of dx
FORMS = ("passes", "one_grid")
NAMES = ("dx", "da", "db", "dbias")
# and what only backward has: chunks of 512, 256 and 128 rows with a tail, more than one block of
# ranks, splits of both passes
MORE = {
    "two_chunks": (600, 136, 200, 16),
    "two_chunks_rank_100": (300, 136, 72, 100),
    "two_chunks_rank_256": (140, 136, 72, 256),
    "two_blocks_of_ranks": (140, 72, 72, 300),
    "rank_past_a_block_odd": (140, 72, 72, 257),
    "many_splits": (70, 1100, 1300, 8),
}


class Step:
    """Operands of one backward call, in the emulator and in float64."""

    def __init__(self, shape, dtype=torch.bfloat16, seed=None, wide=False):
        m, n, k, r = shape
        g = torch.Generator().manual_seed(m + 3 * n + 7 * k + r)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=g) * scale).to(dtype)

        self.shape, self.dtype, self.seed, self.wide = shape, dtype, seed, wide
        self.dy, self.x = normal(m, n), normal(m, k)
        self.weight = normal(n, k, scale=max(n, 1) ** -0.5)
        self.a, self.b = normal(r, k), normal(n, r, scale=max(n, 1) ** -0.5)
        self.h = normal(m, r)

    def options(self, **options) -> dict:
        found = {"bf16": self.dtype == torch.bfloat16, "scale": (SCALE, UP)}
        if self.seed:
            found |= {"seed": self.seed, "threshold": THRESHOLD}
        return found | options

    def operands(self) -> list:
        return [bits(t) for t in (self.dy, self.x, self.weight, self.a, self.b, self.h)]

    def results(self, wanted=NAMES) -> dict[str, torch.Tensor]:
        m, n, k, r = self.shape
        grads = torch.float32 if self.wide else self.dtype
        sizes = {"dx": (m, k), "da": (r, k), "db": (n, r), "dbias": (n,)}
        dtypes = {"dx": self.dtype, "da": grads, "db": grads, "dbias": self.dtype}
        return {name: torch.empty(sizes[name], dtype=dtypes[name]) for name in wanted}

    @staticmethod
    def given(results: dict) -> dict:
        return {n: t.numpy() if t.dtype == torch.float32 else bits(t) for n, t in results.items()}

    def run(self, emulated, copies: int = 1, wanted=NAMES, **options):
        """(results of each copy, what the emulator and the plan say)."""
        results = [self.results(wanted) for _ in range(copies)]
        given = [self.given(r) for r in results]
        return results, emulated.backward(self.operands(), given, self.options(**options))

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """C1 against float64, where the results are; dh is rounded once on its way."""
        device = next(iter(results.values())).device
        m, n, k, r = self.shape
        dy, x, w, a, b, h = (
            t.to(device).double() for t in (self.dy, self.x, self.weight, self.a, self.b, self.h)
        )
        mask = torch.ones(m, k, dtype=torch.bool, device=device)
        if self.seed:
            seed = torch.tensor(self.seed, device=device)
            mask = dropout.reference_mask(seed, m, k, THRESHOLD)
        dropped = torch.where(mask, x, 0)
        dh, dh_total = SCALE * dy @ b, SCALE * dy.abs() @ b.abs()
        rounded = UNIT[self.dtype] * dh.abs() + n * 2.0**-22 * dh_total  # how far dh may be off
        lora = torch.where(mask, dh @ a, 0)
        lora_total = torch.where(mask, dh_total @ a.abs(), 0)
        lora_off = torch.where(mask, rounded @ a.abs(), 0)
        exact = {
            "dx": (dy @ w + UP * lora, dy.abs() @ w.abs() + UP * lora_total, UP * lora_off, n + r),
            "da": (
                UP * dh.T @ dropped, UP * dh_total.T @ dropped.abs(),
                UP * rounded.T @ dropped.abs(), m,
            ),
            "db": (UP * dy.T @ h, UP * dy.abs().T @ h.abs(), 0, m),
            "dbias": (dy.sum(0), dy.abs().sum(0), 0, m),
        }  # fmt: skip
        for name, got in results.items():
            value, total, off, length = exact[name]
            bound = 1.05 * UNIT[got.dtype] * value.abs() + (length + 5) * 2.0**-23 * total
            bound = bound + 1.1 * off + 2.0**-24 * (got.dtype == torch.float16) + 2.0**-133
            assert ((got.double() - value).abs() <= bound).all(), name


def fits_one_grid(shape, seed) -> bool:
    transposed = shape[:3] == (1, 1, 1) and seed is None  # a single weight lies either way
    return 1 <= shape[3] <= 64 and min(shape) > 0 and not transposed


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", (SHAPES | MORE).values(), ids=SHAPES | MORE)
def test_shapes(emulated, shape, form, seed):
    step = Step(shape, seed=seed)
    wanted = NAMES if form == "passes" else NAMES[:3]
    if form == "one_grid" and not fits_one_grid(shape, seed):
        with pytest.raises(
            ValueError, match=r"r is more than 64|no LoRA term|not all three|is transposed"
        ):
            step.run(emulated, wanted=wanted, form=form)
        return
    (results,), found = step.run(emulated, wanted=wanted, form=form)
    step.check(results)
    assert found["bank_conflicts"] == 0 and found["form"] == form
    assert ("backward_sm90" in found["kernels"]) == (form == "one_grid")

"""One weight_grad pass over x for several projections, in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulator.suite import SCHEDULES
from test_forward import bits

from lora_kernels import dropout

SCALES = (1.0, 2.0, 0.5, 4.0, 0.25)  # powers of two, so integers stay exact
THRESHOLDS = (3000, 8000, 12000, 1500, 6000)
SEEDS = {
    "p0": lambda p: [],
    "dropped": lambda p: [77 + p, 5],
    "sharded": lambda p: [77, 5 + p, 32, 48],
    "unaligned": lambda p: [7 + p, 5, 3, 21],
    "one_without": lambda p: [7, 5 + p, 16, 32] if p != 1 else [],
    "second_alone": lambda p: [7, 5] if p == 1 else [],
}
# Ranks of the parts. In the tile of 64 ranks; padded between parts; that of 128; a part that
# straddles two blocks of 256, one that begins in the second and one that is in the first alone.
RANKS = [(16, 16, 16), (8, 3, 41), (7,), (64, 8, 0, 5, 1), (200, 100), (200, 40, 24, 16)]


class Group:
    """Operands of one pass; integers unless `normal`."""

    def __init__(self, m, k, ranks, seeds="p0", dtype=torch.bfloat16, wide=False, normal=False):
        g = torch.Generator().manual_seed(m + 3 * k + sum(ranks))

        def values(*size: int) -> torch.Tensor:
            found = torch.randn(*size, generator=g)
            return (found if normal else found.round().clamp(-1, 1)).to(dtype)

        self.dtype, self.wide, self.ranks = dtype, wide, ranks
        self.seeds = [SEEDS[seeds](p) for p in range(len(ranks))]
        self.firsts = [sum(-(-r // 8) * 8 for r in ranks[:p]) for p in range(len(ranks))]
        self.x = values(m, k)
        # What lies between parts belongs to nobody.
        self.h = torch.full((m, -(-(self.firsts[-1] + ranks[-1]) // 8) * 8), torch.nan, dtype=dtype)
        for p in range(len(ranks)):
            self.h_of(p)[:] = values(m, ranks[p])

    def h_of(self, p: int) -> torch.Tensor:
        return self.h[:, self.firsts[p] : self.firsts[p] + self.ranks[p]]

    def mask(self, p: int) -> torch.Tensor:
        if not self.seeds[p]:
            return torch.ones(self.x.shape, dtype=torch.bool)
        return dropout.reference_mask(torch.tensor(self.seeds[p]), *self.x.shape, THRESHOLDS[p])

    def result(self, p: int) -> torch.Tensor:
        """Every other one lies transposed."""
        dtype, k = torch.float32 if self.wide else self.dtype, self.x.shape[1]
        if p % 2:
            return torch.zeros(k, self.ranks[p], dtype=dtype).t()
        return torch.zeros(self.ranks[p], k, dtype=dtype)

    @staticmethod
    def given(grad: torch.Tensor):
        return grad.numpy() if grad.dtype == torch.float32 else bits(grad)

    def run(self, emulated, **options):
        """(gradients, what the emulator and the plan say)."""
        grads = [self.result(p) for p in range(len(self.ranks))]
        parts = zip(
            self.firsts, map(self.given, grads), SCALES, self.seeds, THRESHOLDS, strict=False
        )
        options = {"bf16": self.dtype == torch.bfloat16} | options
        return grads, emulated.weight_grad_group(bits(self.h), bits(self.x), list(parts), options)

    def run_alone(self, emulated, p: int, **options):
        """Of part p by a pass of its own."""
        grad = self.result(p)
        options = {"bf16": self.dtype == torch.bfloat16, "scale": (1.0, SCALES[p])} | options
        if self.seeds[p]:
            options |= {"seed": self.seeds[p], "threshold": THRESHOLDS[p]}
        found = emulated.weight_grad(
            bits(self.h_of(p).contiguous()), bits(self.x), self.given(grad), options
        )
        return grad, found

    def check(self, grads: list[torch.Tensor]) -> None:
        """Sums are below 2^24, so nothing is rounded before the end."""
        for p, grad in enumerate(grads):
            dropped = torch.where(self.mask(p), self.x.double(), 0)
            exact = SCALES[p] * self.h_of(p).double().T @ dropped
            assert torch.equal(grad, exact.to(grad.dtype)), p


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("m, k", [(600, 200), (131, 67), (1, 8)])
def test_each_part_has_its_own_gradient_scale_and_mask(emulated, m, k, ranks, seeds):
    group = Group(m, k, ranks, seeds, wide=k == 200)
    grads, found = group.run(emulated)
    group.check(grads)
    assert found["bank_conflicts"] == 0
    masked = any(group.seeds) and len(ranks) > 1
    assert (f", {len(ranks)} masks" in found["text"]) == masked


@pytest.mark.parametrize("wide", [False, True])
def test_fp16(emulated, wide):
    group = Group(300, 136, (16, 3, 100), "dropped", torch.float16, wide)
    group.check(group.run(emulated)[0])


def test_nothing_to_read(emulated):
    grads, found = Group(0, 72, (8, 3), "dropped").run(emulated)
    assert found["kernels"] == ["reduce"] and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("seeds", ["p0", "dropped", "unaligned"])
@pytest.mark.parametrize("ranks, parts", [
    ((16, 24, 8), (0, 1, 2)), ((72, 41), (0,)), ((136, 150), (0, 1)),
], ids=str)  # fmt: skip
def test_a_part_has_the_bits_of_a_pass_of_its_own(emulated, ranks, parts, seeds):
    """Where its tile alone is the group's, since then its chunks have as many rows."""
    group = Group(600, 136, ranks, seeds, wide=True, normal=True)
    grads, _ = group.run(emulated)
    for p in parts:
        assert torch.equal(grads[p], group.run_alone(emulated, p)[0])


@pytest.mark.parametrize("ranks", [(16, 3, 40), (200, 100)], ids=str)
def test_any_timing_gives_the_same_bits(emulated, ranks):
    group = Group(300, 328, ranks, "unaligned", wide=True, normal=True)
    first, _ = group.run(emulated, timing="early")
    for timing, schedule in [*SCHEDULES, ("random", 4), ("random", 5)]:
        again, _ = group.run(emulated, timing=timing, schedule=schedule)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("ranks, blocks, masked", [
    ((16, 16, 16), 1, 3), ((64, 8, 24, 8), 1, 4), ((200, 100), 2, 3), ((200, 40, 24, 16), 2, 5),
], ids=str)  # fmt: skip
def test_x_is_read_once_without_dropout(emulated, ranks, blocks, masked):
    """For each block of ranks; with dropout once for each part that a block has ranks of."""
    m, k = 256, 128
    plain = Group(m, k, ranks)
    _, found = plain.run(emulated)
    width = plain.h.shape[1]
    one = Group(m, k, (width,)).run_alone(emulated, 0)[1]["bytes_loaded"]
    unread = width - sum(-(-r // 4) * 4 for r in ranks)  # of partial results, in two chunks
    assert one - found["bytes_loaded"] == 2 * k * unread * 4
    _, dropped = Group(m, k, ranks, "dropped").run(emulated)
    assert dropped["bytes_loaded"] - found["bytes_loaded"] == 2 * m * k * (masked - blocks)


def test_the_model_counts_masks(emulated):
    """Of one tile, so that the plan has nothing to choose."""
    plain, dropped = (
        [Group(128, 64, (8,) * n, seeds).run(emulated)[1]["cycles"] for n in (1, 2, 3)]
        for seeds in ("p0", "dropped")
    )
    more = plain[1] - plain[0]  # partial results of eight ranks more
    assert 0 < more == pytest.approx(plain[2] - plain[1])
    assert dropped[2] - dropped[1] == pytest.approx(dropped[1] - dropped[0])
    # More than a mask for each: the products come again too.
    assert dropped[1] - dropped[0] - more > dropped[0] - plain[0] > 0
    assert Group(128, 64, (8,), "dropped").run_alone(emulated, 0)[1]["cycles"] == dropped[0]


def test_what_one_part_drops_another_keeps(emulated):
    """An infinity reaches the parts that keep it, and those alone."""
    group = Group(300, 136, (16, 16), "dropped")
    clean, _ = group.run(emulated)
    row, column = (~group.mask(0) & group.mask(1)).nonzero()[300].tolist()
    group.x[row, column] = torch.inf
    found, _ = group.run(emulated)
    assert torch.equal(found[0], clean[0])
    others = torch.arange(136) != column
    assert torch.equal(found[1][:, others], clean[1][:, others])
    assert not found[1][:, column].isfinite().any()

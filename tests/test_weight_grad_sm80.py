"""The weight_grad kernel of GPUs other than Hopper's, in the emulator."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from emulator import build
from emulator.suite import POISON, SCHEDULES, far_apart
from pages import table_of
from test_backward import assert_near
from test_down_proj import VIEWS
from test_forward import DTYPES, SEEDS, THRESHOLD, bits
from test_weight_grad_group import Group

from lora_kernels import dropout

SM80 = dict(compute=80)
SCALE = 2.0  # a power of two, so integers stay exact
RANKS = (0, 1, 8, 16, 17, 64, 100, 128, 200, 256)
# (M, K): one element, a tile, a short stage, ragged all over, several chunks, strips and stages
SHAPES = [(1, 1), (64, 128), (65, 136), (131, 67), (600, 200)]
PLAN = re.compile(r"sm80 (\d+) ranks, (\d+) chunks of (\d+) rows x (\d+) splits of 128 columns")


class Pass:
    """Operands of one pass; integers unless `normal`."""

    def __init__(self, m, k, r, dtype=torch.bfloat16, seed=None, wide=False, normal=False):
        g = torch.Generator().manual_seed(m + 3 * k + r)

        def values(*size: int) -> torch.Tensor:
            found = torch.randn(*size, generator=g)
            return (found if normal else found.round().clamp(-1, 1)).to(dtype)

        self.dtype, self.seed = dtype, seed
        self.wide = torch.float32 if wide else dtype
        self.x, self.h = values(m, k), values(m, r)

    def dropped(self) -> torch.Tensor:
        if not self.seed:
            return self.x
        mask = dropout.reference_mask(torch.tensor(self.seed), *self.x.shape, THRESHOLD)
        return torch.where(mask, self.x, 0)

    def run(self, emulated, sums=False, grad=None, **options):
        """(gradient, sums of columns, what the emulator and the plan say)."""
        k, r = self.x.shape[1], self.h.shape[1]
        grad = torch.zeros(r, k, dtype=self.wide) if grad is None else grad
        total = torch.zeros(1, k, dtype=self.dtype)
        given = {"bf16": self.dtype == torch.bfloat16, "scale": (1.0, SCALE)} | SM80 | options
        if self.seed:
            given |= {"seed": self.seed, "threshold": THRESHOLD}
        if sums:
            given["sums"] = bits(total)
        found = emulated.weight_grad(bits(self.h), bits(self.x), Group.given(grad), given)
        return grad, total[0], found

    def exact(self) -> torch.Tensor:
        return SCALE * self.h.double().T @ self.dropped().double()

    def check(self, grad: torch.Tensor) -> None:
        """Sums are below 2^24, so nothing is rounded before the end."""
        assert torch.equal(grad, self.exact().to(grad.dtype))


def plan_numbers(found) -> tuple[int, ...]:
    """(ranks of a tile, chunks, rows of each, strips)."""
    return tuple(map(int, PLAN.search(found["text"]).groups()))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("m, k", SHAPES)
def test_sizes(emulated, m, k, r):
    """The sums of columns come along in every other case, and alone without ranks."""
    p = Pass(m, k, r, DTYPES["fp16" if (m + r) % 2 else "bf16"], wide=r % 3 == 0)
    sums = r == 0 or m in (65, 600)
    grad, total, found = p.run(emulated, sums)
    p.check(grad)
    assert found["bank_conflicts"] == 0 and found["kernels"] == ["weight_grad_sm80", "reduce"]
    assert torch.equal(total.double(), p.x.double().sum(0) if sums else torch.zeros(k).double())


@pytest.mark.parametrize("seed", [s for s in SEEDS.values() if s] + [[7, 5, 1 << 32, 24]])
@pytest.mark.parametrize("m, k, r", [(131, 67, 7), (300, 264, 16), (70, 136, 100), (65, 40, 200)])
def test_dropout(emulated, m, k, r, seed):
    p = Pass(m, k, r, seed=seed, wide=True)
    grad, _, found = p.run(emulated)
    p.check(grad)
    assert found["bank_conflicts"] == 0


@pytest.mark.parametrize("operand", ["x", "h"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(emulated, view, operand):
    """What 16-byte copies cannot address is loaded element by element; nothing is copied ahead."""
    p = Pass(140, 136, 24, seed=SEEDS["sharded"])
    setattr(p, operand, view(getattr(p, operand)))
    grad, _, found = p.run(emulated)
    p.check(grad)
    assert found["kernels"] == ["weight_grad_sm80", "reduce"]


def test_rows_so_far_apart_that_offsets_pass_32_bits(emulated):
    p = Pass(70, 40, 8)
    p.x = torch.from_numpy(far_apart(bits(p.x))).view(p.dtype)
    p.check(p.run(emulated)[0])


@pytest.mark.parametrize("r", [3, 40])
def test_memory_around_results_is_untouched(emulated, r):
    """The emulator reports a write past the workspace; a gradient may be part of a tensor."""
    p = Pass(200, 136, r)
    around = torch.full((2 * r, 140), 7.0, dtype=p.dtype)
    grad, _, _ = p.run(emulated, True, around[::2, 2:138])
    p.check(grad)
    found = bits(around)
    found[::2, 2:138] = POISON
    assert set(np.unique(found)) <= {POISON, bits(torch.full((1, 1), 7.0, dtype=p.dtype)).item()}


@pytest.mark.parametrize("seeds", ["p0", "sharded", "unaligned", "one_without"])
@pytest.mark.parametrize("ranks", [(8, 3, 41), (64, 8, 0, 5, 1), (200, 40, 24)], ids=str)
def test_each_part_has_its_own_gradient_scale_and_mask(emulated, ranks, seeds):
    """What lies in h between parts is NaN."""
    group = Group(131, 200, ranks, seeds, wide=True)
    grads, found = group.run(emulated, **SM80)
    group.check(grads)
    assert found["bank_conflicts"] == 0
    assert (f", {len(ranks)} masks" in found["text"]) == any(group.seeds)


def test_dropped_infinities_vanish(emulated):
    """One that is kept reaches its column alone."""
    p = Pass(140, 136, 16, seed=SEEDS["dropped"])
    clean, _, _ = p.run(emulated)
    lost = (p.dropped() == 0) & (p.x != 0)
    p.x[lost] = torch.inf
    p.x[lost.nonzero()[::2].unbind(1)] = torch.nan
    assert lost.sum() > 1000 and torch.equal(p.run(emulated)[0], clean)
    row, column = (p.dropped() != 0).nonzero()[300].tolist()
    p.x[row, column] = torch.inf
    found, _, _ = p.run(emulated)
    others = torch.arange(136) != column
    assert torch.equal(found[:, others], clean[:, others])
    assert not found[:, column].isfinite().any()


@pytest.mark.parametrize("rows", [127, 128, 129, 255, 257])
def test_edges_of_chunks(emulated, rows):
    """Whose number depends on the device; each row counts once."""
    p = Pass(rows, 72, 16, wide=True)
    for multiprocessors in (1, 2, 100):
        grad, total, found = p.run(emulated, True, multiprocessors=multiprocessors)
        p.check(grad)
        assert torch.equal(total.double(), p.x.double().sum(0))
        _, chunks, each, _ = plan_numbers(found)
        assert (chunks - 1) * each < rows <= chunks * each and each % 64 == 0


@pytest.mark.parametrize("seed", [None, SEEDS["unaligned"]])
def test_any_timing_gives_the_same_bits(emulated, seed):
    p = Pass(300, 200, 24, seed=seed, wide=True, normal=True)
    first, sums, _ = p.run(emulated, True, timing="early")
    for timing, schedule in [*SCHEDULES, ("random", 4), ("random", 5)]:
        again, others, _ = p.run(
            emulated, True, timing=timing, schedule=schedule, resident_blocks=1 + schedule
        )
        assert torch.equal(again, first) and torch.equal(others, sums)


@pytest.mark.parametrize("m, k, r", [(300, 200, 16), (256, 256, 100), (128, 136, 200)])
def test_x_is_read_once_for_each_block_of_ranks(emulated, m, k, r):
    """h once for each strip of 128 columns, partial results once, in fours of ranks."""
    for seed in (None, SEEDS["dropped"]):
        _, _, found = Pass(m, k, r, seed=seed).run(emulated, True)
        rank, chunks, _, strips = plan_numbers(found)
        blocks = -(-r // rank)
        loads = 2 * m * (k * blocks + r * strips)
        assert found["bytes_loaded"] == loads + 4 * chunks * k * (-(-r // 4) * 4 + 4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m, k, r", [(600, 136, 16), (300, 72, 100), (200, 40, 256)])
def test_real_numbers_stay_within_c1(emulated, m, k, r, dtype):
    for seed, wide in ((None, False), (SEEDS["sharded"], True)):
        p = Pass(m, k, r, dtype, seed, wide, normal=True)
        grad, total, _ = p.run(emulated, seed is None)
        bound = SCALE * p.h.double().abs().T @ p.dropped().double().abs()
        assert_near(grad, p.exact(), bound, 0, m, "grad")
        if seed is None:
            x = p.x.double()
            assert_near(total, x.sum(0), x.abs().sum(0), 0, m, "sums")


@pytest.mark.parametrize("m, k", [(0, 72), (20, 0)])
def test_nothing_to_read(emulated, m, k):
    grad, _, found = Pass(m, k, 8).run(emulated)
    assert not grad.any() and found["kernels"] == (["reduce"] if k else [])


# ---- the plan -----------------------------------------------------------------------------------


def plan_of(emulated, m, k, r, **options):
    def matrix(rows: int, columns: int) -> np.ndarray:
        one = np.zeros((1, 1), np.uint16)
        return np.lib.stride_tricks.as_strided(one, (rows, columns), (0, 0))

    options = dict(compute=80, multiprocessors=108) | options
    return emulated.weight_grad_plan(matrix(m, r), matrix(m, k), options)


@pytest.mark.parametrize("m", [1, 300, 2048, 8192, 1 << 20])
@pytest.mark.parametrize("r", RANKS)
def test_every_plan_fits(emulated, m, r):
    """Tiles hold the ranks, fit the smallest device, and partial results stay small."""
    for compute, k in ((80, 4096), (86, 136), (120, 14336)):
        p = plan_of(emulated, m, k, r, compute=compute)
        chunks, strips, blocks = p["grid"]
        assert p["kernel"] == "sm80" and not p["makes_down"]
        assert p["shared_bytes"] <= 99 << 10 and p["rank"] * blocks >= r
        assert p["rows"] % 64 == 0 and (chunks - 1) * p["rows"] < m <= chunks * p["rows"]
        assert strips == -(-k // 128) and chunks <= 65535 and 0 < p["cycles"] < float("inf")
        assert chunks == 1 or p["workspace_bytes"] <= m * k * 2 / 4
        assert chunks == 1 or chunks * strips * blocks <= 2 * 108  # one wave


def test_chunks_fill_the_device(emulated):
    """Up to two blocks a multiprocessor where partial results allow as many."""
    for r, blocks in ((16, 6 * 32), (64, 6 * 32), (128, 6 * 32), (256, 3 * 64), (512, 1 * 128)):
        chunks, strips, of_ranks = plan_of(emulated, 8192, 4096, r)["grid"]
        assert chunks * strips * of_ranks == blocks


def test_which_kernel(emulated):
    for given, kernel, reason in [
        (dict(compute=90), "sm90", "weight_grad_sm90"),
        (dict(compute=90, sm90a=False), "sm80", "built without sm_90a"),
        (dict(compute=120), "sm80", "not of compute capability 9.0"),
        (dict(compute=90, m=1 << 32), "sm80", "which TMA cannot address"),
        (dict(compute=75), "none", "older than compute capability 8.0"),
        (dict(k=1 << 31), "none", "more than 2^34 elements"),
        (dict(compute=90, k=1 << 31), "none", "more than 2^34 elements"),
    ]:
        found = plan_of(emulated, **dict(m=4096, k=4096, r=16) | given)
        assert found["kernel"] == kernel and reason in found["text"]
        assert found["served"] == (kernel != "none")


def test_the_page_quotes_the_tiles(emulated):
    rows = table_of(build.ROOT / "docs/backward.md", "## dA and dB on other GPUs")
    assert [rank for rank, *_ in rows] == ["16", "64", "128"]
    for rank, stages, memory, registers in rows:
        size = emulated.shared_bytes()[f"WeightGradSm80Tile<{rank}, {stages}>"]
        assert memory == f"{size / 1024:.0f} KB" and int(registers) == int(rank) // 2


def test_down_projections_are_left_to_down_proj(emulated):
    assert plan_of(emulated, 4096, 4096, 16, compute=90, down=True)["makes_down"]
    assert not plan_of(emulated, 4096, 4096, 16, down=True)["makes_down"]


def test_a_pass_of_an_older_device_is_refused(emulated):
    with pytest.raises(ValueError, match=r"older than compute capability 8\.0"):
        Pass(8, 8, 8).run(emulated, compute=75)

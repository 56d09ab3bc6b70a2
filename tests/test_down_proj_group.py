"""down_proj of projections that share x, by one launch, in the emulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator.suite import SCHEDULES, place_of_h
from mutation_problems import ternary
from test_down_proj import DTYPES, THRESHOLD, bits, check

from lora_kernels import dropout

# ranks of the projections; each is there for a reason
RANKS = {
    "one": (1,),
    "q_k_v": (16, 16, 16),
    "odd": (8, 3, 64),
    "a_full_tile": (128, 120, 8),
    "two_tiles": (200, 100, 40),
    "past_a_tile": (300, 8),
    "past_a_tile_between": (5, 520, 17, 9),
    "five": (8, 16, 1, 24, 64),
}
# M, K: ragged or not, fewer stages than warpgroups, more than the ring has
DEPTHS = {"one_stage": (64, 64), "ragged": (70, 200), "deep": (66, 1096), "row": (1, 8)}
SEEDS = {
    "p0": lambda i: [],
    "dropped": lambda i: [77 + i, 5],
    "sharded": lambda i: [77, 5 + i, 32, 48],
    "unaligned": lambda i: [7, 5, 3 + i, 21 + 2 * i],
}


def problem(m, k, ranks, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(m + 3 * k + sum(ranks))
    x, *downs = (torch.randn(n, k, generator=g).to(dtype) for n in (m, *ranks))
    return x, downs


def options(x, seeds, scales, **schedule) -> dict:
    return schedule | {
        "bf16": x.dtype == torch.bfloat16, "seeds": seeds, "scales": scales,
        "threshold": THRESHOLD,
    }  # fmt: skip


def run(emulated, x, downs, seed=SEEDS["p0"], hs=None, **schedule):
    """(h of each, their scales, what the emulator and the plan say)."""
    hs = hs or [torch.empty(x.shape[0], d.shape[0], dtype=x.dtype) for d in downs]
    scales = [-1.5 + i for i in range(len(downs))]
    seeds = [seed(i) for i in range(len(downs))]
    given = options(x, seeds, scales, **schedule)
    found = emulated.down_proj_group(bits(x), list(map(bits, downs)), list(map(bits, hs)), given)
    return hs, scales, found


def alone(emulated, x, down, seed, scale):
    """h of a call by itself, by the sm_90a kernel."""
    h = torch.empty(x.shape[0], down.shape[0], dtype=x.dtype)
    is_bf16 = x.dtype == torch.bfloat16
    found = emulated.down_proj(bits(x), bits(down), bits(h), is_bf16, seed, THRESHOLD, scale, 90, 1)
    assert found["kernels"] == ["down_proj_sm90"]
    return h


def same_bits(a, b) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_the_bits_of_single_calls(emulated, ranks, shape, dtype, seed):
    x, downs = problem(*shape, ranks, dtype)
    hs, scales, found = run(emulated, x, downs, seed)
    assert found["kernels"] == ["down_proj_sm90"] and found["bank_conflicts"] == 0
    for i, (h, down, scale) in enumerate(zip(hs, downs, scales, strict=True)):
        check(h, x, down, seed(i) or None, scale)
        assert same_bits(h, alone(emulated, x, down, seed(i), scale))


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_exact_integers(emulated, ranks, seed):
    """No sum is rounded, so every element is what integers say."""
    g = np.random.default_rng(sum(ranks))
    x, *downs = (
        torch.from_numpy(ternary(g, n, 328, keep=60)).to(torch.bfloat16) for n in (130, *ranks)
    )
    hs, scales, _ = run(emulated, x, downs, seed)
    for i, (h, down, scale) in enumerate(zip(hs, downs, scales, strict=True)):
        kept = x.double()
        if seed(i):
            mask = dropout.reference_mask(torch.tensor(seed(i)), *x.shape, THRESHOLD)
            kept = torch.where(mask, kept, 0)
        assert torch.equal(h.double(), scale * kept @ down.double().T)


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("seed", ["p0", "dropped"])
def test_any_place_of_h(emulated, seed, where):
    """Padded rows, columns apart, transposed, an odd offset: nothing beside an h is written."""
    ranks = (7, 16, 33)
    x, downs = problem(70, 136, ranks)
    placed = [place_of_h(70, r, (where + i) % 4) for i, r in enumerate(ranks)]
    hs = [torch.from_numpy(h).view(torch.bfloat16) for h, _ in placed]
    run(emulated, x, downs, SEEDS[seed], hs)
    expected, _, _ = run(emulated, x, downs, SEEDS[seed])
    for h, other, (_, around) in zip(hs, expected, placed, strict=True):
        assert same_bits(h, other) and np.isin(around, (0, 0xFFFF)).all()


@pytest.mark.parametrize("seed", ["p0", "dropped"])
def test_any_timing_gives_the_same_bits(emulated, seed):
    x, downs = problem(200, 328, (24, 8, 100))
    first, _, _ = run(emulated, x, downs, SEEDS[seed], timing="early")
    for timing, schedule in SCHEDULES:
        hs, _, _ = run(
            emulated, x, downs, SEEDS[seed], timing=timing, schedule=schedule,
            resident_blocks=1 + schedule,
        )  # fmt: skip
        assert all(map(same_bits, hs, first))


@pytest.mark.parametrize(
    "ranks, rank, parts",
    [
        ((16, 16, 16), 64, 1),
        ((8, 3, 64), 128, 1),
        ((1,), 16, 1),
        ((128, 120, 8), 256, 1),
        ((128, 120, 9), 128, 3),
        ((200, 100, 40), 256, 2),
        ((300, 8), 128, 4),
        ((9, 100, 300), 128, 4),
    ],
)
def test_x_is_read_once_a_part(emulated, ranks, rank, parts):
    """By all projections that fit a tile, and tiles are as wide as takes the fewest clocks; each
    projection loads its own `down` once a row block."""
    m, k = 256, 136
    x, downs = problem(m, k, ranks)
    _, _, found = run(emulated, x, downs)
    assert (found["rank"], found["parts"], found["blocks"]) == (rank, parts, m // 64)
    assert found["bytes_loaded"] == 2 * k * (parts * m + found["blocks"] * sum(ranks))


def test_a_mask_each_is_a_part_each(emulated):
    m, k, ranks = 128, 136, (16, 3, 300)
    x, downs = problem(m, k, ranks)
    _, _, found = run(emulated, x, downs, SEEDS["dropped"])
    assert (found["rank"], found["parts"]) == (256, 4)
    assert found["bytes_loaded"] == 2 * k * (4 * m + found["blocks"] * sum(ranks))


def test_no_rows(emulated):
    x, downs = problem(0, 64, (8, 8))
    _, _, found = run(emulated, x, downs)
    assert found["kernels"] == []


def test_what_is_not_served(emulated):
    x, downs = problem(70, 136, (16, 8))
    first = [[1, 2], []]
    for x_, downs_, seed, more, reason in [
        (x, downs * 3, SEEDS["p0"], {}, "no place for so many"),
        (x, [], SEEDS["p0"], {}, "no place for so many"),
        (x, downs, first.__getitem__, {}, "some projections have dropout"),
        (x, [downs[0], downs[1].t().contiguous().t()], SEEDS["p0"], {}, "transposed A"),
        (x, [downs[0], downs[1][:0]], SEEDS["p0"], {}, "no ranks"),
        (x[:, 1:129], [d[:, :128] for d in downs], SEEDS["p0"], {}, "cannot address x"),
        (x[:, :128], [d[:, 1:129] for d in downs], SEEDS["p0"], {}, "cannot address A"),
        (x, downs, SEEDS["p0"], {"compute": 80}, "compute capability"),
    ]:
        with pytest.raises(ValueError, match=reason):
            run(emulated, x_, downs_, seed, **more)

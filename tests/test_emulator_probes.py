"""Whole mechanisms in the emulator: a persistent cluster GEMM, and a relay through flags."""

from __future__ import annotations

import numpy as np
import pytest

SCHEDULES = [("early", 0), ("late", 1), ("random", 2), ("random", 3)]


def bf16(values: np.ndarray) -> np.ndarray:
    """Small integers, exact in bf16, as bit patterns."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def ternary(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Sums of products of a few hundred of these stay below 2^8: bf16 holds them."""
    return rng.integers(-1, 2, shape) * (rng.random(shape) < 0.4)


def run_gemm(emulated, shape, tile_n=128, trans=(False, False), clusters=2, **schedule):
    m, n, k = shape
    rng = np.random.default_rng(sum(shape))
    a, b = ternary(rng, m, k), ternary(rng, n, k)
    left = np.ascontiguousarray(bf16(a.T if trans[0] else a))
    right = np.ascontiguousarray(bf16(b.T if trans[1] else b))
    c = np.zeros((m, n), np.uint16)
    arguments = {"schedule": 0, "timing": "random", "resident_blocks": 1 << 20} | schedule
    emulated.gemm_probe(left, right, c, tile_n, *trans, clusters, *arguments.values())
    assert np.array_equal(from_bf16(c), a @ b.T)


# M, N, K: an exact tile; every dimension ragged; a last cluster whose second block has no rows
SHAPES = [(256, 128, 64), (328, 200, 200), (72, 136, 328)]


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
@pytest.mark.parametrize("trans", [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cluster_gemm(emulated, shape, trans, timing, schedule):
    run_gemm(emulated, shape, trans=trans, timing=timing, schedule=schedule)


@pytest.mark.parametrize("trans", [(False, False), (False, True)])
def test_wide_tiles(emulated, trans):
    run_gemm(emulated, (300, 520, 136), tile_n=256, trans=trans, clusters=3)


def test_fewer_clusters_than_tiles_and_than_room(emulated):
    for resident in (2, 4):
        run_gemm(emulated, (520, 264, 72), clusters=3, resident_blocks=resident, schedule=resident)


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
@pytest.mark.parametrize("grids", [1, 2])
@pytest.mark.parametrize("resident", [1, 2, 16])
def test_relay(emulated, resident, grids, timing, schedule):
    """Progress with any residency, and two grids at once do not disturb each other."""
    rng = np.random.default_rng(resident)
    tiles = 5
    source = rng.integers(0, 1 << 15, (64 * tiles, 64)).astype(np.uint16)
    h = [np.zeros_like(source) for _ in range(grids)]
    out = [np.zeros_like(source) for _ in range(grids)]
    emulated.relay_probe(source, h, out, 4, schedule, timing, resident)
    assert all(np.array_equal(o, source) for o in out)


def test_schedules_differ(emulated):
    """Different seeds give different executions; the same seed gives the same one."""
    x = np.zeros((128, 256), np.uint16)
    down, h = np.zeros((16, 256), np.uint16), np.zeros((128, 16), np.uint16)

    def rounds(seed: int) -> int:
        found = emulated.down_proj(x, down, h, True, [], 0, 1.0, 90, 4, schedule=seed)
        return found["rounds"]

    assert rounds(1) == rounds(1)
    assert len({rounds(seed) for seed in range(8)}) > 1

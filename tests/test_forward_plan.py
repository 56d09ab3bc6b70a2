"""What fused_gemm and the forward pass would launch: plans, and the pages that quote them."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from emulator import build
from pages import table_of

PAGE = build.ROOT / "docs/fused_gemm.md"


@pytest.mark.parametrize("chain, first", [(0, False), (1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("columns", [1, 2, 17])
@pytest.mark.parametrize("pairs, group", [(1, 1), (5, 5), (8, 8), (33, 8), (33, 1), (7, 3)])
def test_raster_covers_the_work_once(emulated, pairs, group, columns, chain, first):
    places = emulated.raster(pairs, columns, group, chain, first)
    tiles = [(pair, column) for is_h, pair, column, _ in places if not is_h]
    chains = [range(pair, pair + count) for is_h, pair, _, count in places if is_h]
    assert sorted(tiles) == list(itertools.product(range(pairs), range(columns)))
    assert sorted(p for of in chains for p in of) == (list(range(pairs)) if chain else [])
    assert all(1 <= len(of) <= chain for of in chains)
    # a group of rows is finished before the next one is begun
    assert [pair // group for pair, _ in tiles] == sorted(pair // group for pair, _ in tiles)
    # what a tile reads is claimed before it
    made = set() if chain else set(range(pairs))
    for is_h, pair, _, count in places:
        made |= set(range(pair, pair + count)) if is_h else set()
        assert is_h or pair in made
    if first and chain:
        assert all(place[0] for place in places[: len(chains)])


def plan_of(emulated, m: int, n: int, k: int, r: int, **options) -> dict:
    """The plan for operands that have no memory."""

    def shaped(rows: int, cols: int) -> np.ndarray:
        one = np.zeros(8, np.uint16)
        return np.lib.stride_tricks.as_strided(one, (rows, cols), (2 * cols, 2))

    operands = [shaped(*shape) for shape in ((m, k), (n, k), (r, k), (n, r))]
    given = {"multiprocessors": 132} | options
    return emulated.forward_plan(*operands, None, shaped(m, n), shaped(m, r), given)


@pytest.mark.parametrize("r", [1, 8, 16, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("m", [1, 200, 4096, 8192, 100_000, 1 << 24])
@pytest.mark.parametrize("n, k", [(4096, 4096), (14336, 4096), (1024, 8192), (1000, 1000)])
def test_every_plan_fits(emulated, n, k, m, r):
    # In the plan alone: nothing is that large here.
    plan = plan_of(emulated, m, n, k, r, form="" if m > 64 else "two_launches")
    assert plan["served"] and plan["shared_bytes"] <= 227 << 10
    assert plan["tiles"] == -(-m // 256) * -(-n // plan["tile_n"])
    assert 1 <= plan["clusters"] <= 66
    assert plan["form"] == "two_launches" or r <= 128
    assert plan["rank"] == (0 if r > 128 else 64 if r <= 64 else 128)
    assert plan["form"] == "two_launches" or 1 <= plan["chain"] <= 4


def test_the_tile_follows_the_waves(emulated):
    """128x256 where waves are many; a narrower tile where it saves a wave."""
    plans = {
        m: plan_of(emulated, m, n, 4096, 16)["tile_n"]
        for m, n in ((8192, 8192), (16384, 14336), (512, 4096))
    }
    assert plans[8192] == plans[16384] == 256 and plans[512] == 128


def test_the_model_says_what_design_says(emulated):
    """Predicted overhead at M = 8192, by the same model as the page's: r <= 32 below 2 %."""
    for m, (n, k) in itertools.product(
        (4096, 8192), ((4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336))
    ):
        for r in (8, 16, 32):
            one = plan_of(emulated, m, n, k, r)
            two = plan_of(emulated, m, n, k, r, form="two_launches")
            assert one["form"] == "one_launch"
            assert 0 < one["overhead"] < 0.02 and one["overhead"] < two["overhead"] < 0.12


def test_chains_come_first_where_few_clusters_make_them(emulated):
    few, many = (plan_of(emulated, m, 8192, 8192, 16, chain=1) for m in (4096, 16384))
    assert few["chains_first"] and not many["chains_first"]


def test_what_one_launch_does_not_serve(emulated):
    shape = (512, 512, 512, 16)
    transposed = np.zeros((512, 512), np.uint16).T
    operands = [np.zeros(s, np.uint16) for s in ((512, 512), (16, 512), (512, 16), (512, 16))]
    x, a, b, h = operands
    given = {"form": "one_launch"}
    plan = emulated.forward_plan(x, transposed, a, b, None, x, h, given)
    assert not plan["served"] and "transposed" in plan["reason"]
    for r, reason in ((129, "more than 128"), (0, "no LoRA term")):
        plan = plan_of(emulated, *shape[:3], r, **given)
        assert not plan["served"] and reason in plan["reason"]


@pytest.mark.parametrize("large", [(1 << 31, 8, 8, 8), (8, 1 << 31, 8, 8), (8, 8, 1 << 31, 8)])
def test_fault_21_what_tma_cannot_count_takes_the_sm_80_kernel(emulated, large):
    plan = plan_of(emulated, *large, form="two_launches")
    assert plan["served"] and "fused_gemm_sm80" in plan["text"] and "2^31" in plan["text"]
    plan = plan_of(emulated, 1 << 30, 1 << 16, 8, 8)
    assert not plan["served"] and "tiles" in plan["reason"]


def test_a_failed_launch_is_the_last(emulated):
    """Nothing is launched behind one that failed: copies, zeroing, kernels, copies of h."""
    x, w, a, b = (np.zeros(s, np.uint16) for s in ((64, 67), (72, 67), (7, 67), (72, 7)))
    y, h = np.zeros((64, 72), np.uint16), np.zeros((64, 7), np.uint16)
    for form, kernels in (
        ("one_launch", ["pack", "zero", "forward_sm90", "pack"]),
        ("two_launches", ["pack", "down_proj_sm80", "fused_gemm_sm90", "pack"]),
    ):
        for fails in range(len(kernels) + 1):
            given = {"form": form, "fails": fails}
            assert emulated.launches(x, w, a, b, None, y, h, given) == kernels[: fails + 1]


@pytest.mark.parametrize("name", ["fused_gemm_sm90", "forward_sm90"])
def test_launchers_pass_maps_in_the_order_of_the_kernel(name):
    """Tensor maps have one type: an exchange of two would compile, and the emulator has its own."""
    folder = build.ROOT / "csrc/cuda"
    signature = (folder / f"{name}.cuh").read_text().split(f"{name}_kernel(const")[1]
    parameters = re.findall(r"(\w+)_map\b", signature[: signature.index("{")])
    call = (folder / f"{name}.cu").read_text().split("launch_kernel(kernel")[1]
    arguments = re.findall(r"\bmaps\.(\w+)|\b(a)_map\b", call[: call.index(";")])
    assert [one or other for one, other in arguments] == parameters


def test_whole_waves_are_not_broken_for_h(emulated):
    """4 whole waves leave no turn for a chain: memory takes less time than a turn more."""
    plan = plan_of(emulated, 2816, 6144, 4096, 16, tile_n=256)
    assert plan["form"] == "two_launches" and "by the model" in plan["reason"]


def test_the_plan_says_why(emulated):
    shape = (8192, 4096, 4096, 16)
    for options, reason in [
        (dict(compute=80), "compute capability"),
        (dict(compute=100), "compute capability"),
        (dict(sm90a=False), "9.0a"),
    ]:
        plan = plan_of(emulated, *shape, **options)
        assert plan["served"] and "fused_gemm_sm80" in plan["text"] and reason in plan["text"]
    plan = plan_of(emulated, *shape, compute=75)
    assert not plan["served"] and "older" in plan["reason"] and plan["text"] == plan["reason"]
    text = plan_of(emulated, *shape)["text"]
    for part in ("one launch", "128x256x64", "4 stages", "132 blocks", "512 tiles", "7.7 waves",
                 "by the model"):  # fmt: skip
        assert part in text
    text = plan_of(emulated, 8192, 4100, 4100, 12)["text"]
    assert "copied first" in text and "x, weight, B" in text and "ordinary stores" in text
    with pytest.raises(ValueError, match="one_launch, two_launches"):
        plan_of(emulated, *shape, form="three_launches")


def test_the_page_quotes_the_model(emulated):
    def percent(plan: dict) -> str:
        return f"{100 * plan['overhead']:.1f}"

    rows = table_of(PAGE, "## Predictions")
    assert len(rows) == 8
    for shape, *cells in rows:
        sizes = [int(number) for number in shape.split(",")]
        for r, cell in zip((16, 32, 64, 128), cells, strict=True):
            best = plan_of(emulated, *sizes, r)
            two = plan_of(emulated, *sizes, r, form="two_launches")
            one = percent(best) if best["form"] == "one_launch" else "-"
            assert cell == f"{one} / {percent(two)}", (shape, r)


def test_the_page_quotes_the_tiles(emulated):
    rows = table_of(PAGE, "## The GEMM")
    assert [row[0] for row in rows] == ["128x256x64", "128x192x64", "128x128x64"]
    for tile, stages, _, shared, _ in rows:
        plan = plan_of(emulated, 512, 512, 512, 16, tile_n=int(tile.split("x")[1]))
        assert int(stages) == plan["stages"]
        assert shared == f"{plan['shared_bytes'] / 1024:.0f} KB"


def test_dropout_costs_what_the_page_says(emulated):
    seed = dict(seed=[1, 2], threshold=1)
    for shape, more in (((8192, 4096, 4096), 0.0), ((16384, 28672, 8192), 0.003)):
        plain, dropped = (plan_of(emulated, *shape, 16, **options) for options in ({}, seed))
        assert dropped["overhead"] - plain["overhead"] == pytest.approx(more, abs=5e-4)
    assert re.search(r"0\.3 points at 16384, 28672, 8192", PAGE.read_text())

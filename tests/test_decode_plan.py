"""What decode would launch: plans of a few rows, and the page that quotes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulator import build
from pages import table_of
from test_forward_plan import plan_of

PAGE = build.ROOT / "docs/decode.md"
DEVICES = {
    "H100": dict(compute=90, multiprocessors=132),
    "A100": dict(compute=80, multiprocessors=108),
}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (1000, 1000), (128256, 4096)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, k", [*SHAPES, (8, 8), (1, 70_000)])
def test_every_plan_fits(emulated, n, k, device):
    for m, r, splits in itertools.product((1, 16, 17, 64), (0, 1, 16, 48, 100, 128), (0, 1, 8)):
        if splits > 1 and device == "A100":
            continue
        plan = plan_of(emulated, m, n, k, r, form="decode", splits=splits, **DEVICES[device])
        found = plan["decode"]
        assert plan["served"] and found["shared_bytes"] <= 99 << 10
        assert found["tile_n"] % 16 == 0 and found["m"] >= m
        assert found["tile_n"] + -(-r // 16) * 16 <= found["rows"]
        assert (plan["tiles"] - 1) * found["tile_n"] < n <= plan["tiles"] * found["tile_n"]
        stages = -(-k // 64)
        assert found["splits"] * found["stages"] >= stages > found["splits"] * (found["stages"] - 1)
        assert found["splits"] in ((1, 2, 4, 8) if splits == 0 else (splits,))


@pytest.mark.parametrize("n, k", SHAPES)
def test_few_rows_take_decode(emulated, n, k):
    """Up to 64, since 128 rows of other tiles cost more turns than W costs memory time."""
    forms = {m: plan_of(emulated, m, n, k, 16)["form"] for m in (1, 16, 17, 64, 65, 128)}
    assert [m for m, form in forms.items() if form == "decode"] == [1, 16, 17, 64]
    for m in (1, 64):
        plan = plan_of(emulated, m, n, k, 16, compute=80, multiprocessors=108)
        assert plan["served"] and plan["form"] == "decode"


def test_the_model_leaves_wide_ranks_to_others(emulated):
    """Every tile would read 128 rows of A for 64 of W: L2 takes longer than memory."""
    assert plan_of(emulated, 64, 14336, 4096, 128)["form"] == "two_launches"
    forced = plan_of(emulated, 64, 14336, 4096, 128, form="decode")
    assert (
        forced["served"] and forced["decode"]["seconds"] > 1.2 * forced["decode"]["floor_seconds"]
    )


@pytest.mark.parametrize("n, k", SHAPES)
def test_the_grid_fills_the_device(emulated, n, k):
    """Three of five multiprocessors at least, those of N = 1000 by parts of K; on Hopper alone."""
    for m, r in itertools.product((1, 16, 64), (0, 16)):
        plan = plan_of(emulated, m, n, k, r, form="decode")
        assert min(plan["tiles"] * plan["decode"]["splits"], 132) >= 0.6 * 132


def test_one_part_where_there_are_no_clusters(emulated):
    for options in (dict(compute=80), dict(compute=89), dict(compute=100), dict(sm90a=False)):
        plan = plan_of(emulated, 1, 1024, 4096, 16, **options)
        assert plan["form"] == "decode" and plan["decode"]["splits"] == 1
        plan = plan_of(emulated, 1, 1024, 4096, 16, form="decode", splits=2, **options)
        assert not plan["served"] and "so many rows and splits" in plan["reason"]
    assert plan_of(emulated, 1, 1024, 4096, 16)["decode"]["splits"] > 1


def test_more_work_takes_no_less_time(emulated):
    """By the model, within the 2 % that a plan gives for a fuller device; never below the floor."""
    for device, r in itertools.product(DEVICES.values(), (0, 16, 128)):

        def seconds(m, n, k, r=r, device=device):
            found = plan_of(emulated, m, n, k, r, form="decode", **device)["decode"]
            assert found["seconds"] > found["floor_seconds"] > 2 * n * k / 3.1e12
            return found["seconds"]

        for k in (1024, 4096, 16384):
            by_n = [seconds(1, n, k) for n in (512, 1024, 3000, 4096, 8192, 30_000)]
            assert all(more >= 0.98 * less for less, more in itertools.pairwise(by_n))
            by_m = [seconds(m, 4096, k) for m in (1, 8, 16, 17, 40, 64)]
            assert all(more >= 0.98 * less for less, more in itertools.pairwise(by_m))
        by_k = [seconds(1, 4096, k) for k in (1024, 2048, 4096, 8192)]
        assert all(more > 1.2 * less for less, more in itertools.pairwise(by_k))


def test_the_plan_says_why(emulated):
    shape = (20, 512, 512, 16)
    for changed, options, reason in [
        (dict(), dict(compute=75), "below 8.0"),
        (dict(m=65), {}, "up to 64 rows"),
        (dict(r=129), {}, "r up to 128"),
        (dict(n=1 << 31), {}, "2^31"),
        (dict(k=1 << 31), {}, "2^31"),
        (dict(r=128), dict(rows=64), "so many rows and splits"),
        (dict(k=508), {}, "contiguous rows of the weight on 16-byte boundaries"),
    ]:
        given = dict(zip("mnkr", shape, strict=True)) | changed
        plan = plan_of(emulated, **given, form="decode", **options)
        assert not plan["served"] and reason in plan["reason"] and reason in plan["text"]
    text = plan_of(emulated, *shape)["text"]
    for part in ("one launch for few rows", "64x64x64", "tiles of", "columns", "parts of a cluster",
                 "KB shared", "by the model", "LoRA term"):  # fmt: skip
        assert part in text
    with pytest.raises(ValueError, match="one_launch, two_launches, decode"):
        plan_of(emulated, *shape, form="decoded")


def test_a_failed_launch_is_returned(emulated):
    x, w, a, b = (np.zeros(s, np.uint16) for s in ((4, 64), (72, 64), (8, 64), (72, 8)))
    y, h = np.zeros((4, 72), np.uint16), np.zeros((4, 8), np.uint16)
    for fails in (0, 1):
        given = {"form": "decode", "fails": fails}
        assert emulated.launches(x, w, a, b, None, y, h, given) == ["decode"]


def test_the_page_quotes_the_model(emulated):
    rows = table_of(PAGE, "## Predictions")
    assert len(rows) == 7
    for device, shape, floor, *cells in rows:
        n, k = (int(number) for number in shape.split(","))
        options = dict(form="decode", **DEVICES[device])
        plans = [plan_of(emulated, m, n, k, 16, **options)["decode"] for m in (1, 16, 64)]
        plans.append(plan_of(emulated, 1, n, k, 128, **options)["decode"])
        assert floor == f"{1e6 * plans[0]['floor_seconds']:.1f}"
        assert cells == [f"{1e6 * plan['seconds']:.1f}" for plan in plans], shape


def test_the_page_quotes_the_tiles(emulated):
    rows = table_of(PAGE, "## Plan")
    assert len(rows) == 4
    for tile, stages, shared, *_ in rows:
        m, height = (int(number) for number in tile.split("x"))
        plan = plan_of(emulated, m, 512, 512, 16, form="decode", rows=height)["decode"]
        assert (plan["m"], plan["rows"]) == (m, height)
        assert shared == f"{plan['shared_bytes'] / 1024:.0f} KB"
        ring = plan["shared_bytes"] - 1024
        assert ring == int(stages) * 128 * (m + height)

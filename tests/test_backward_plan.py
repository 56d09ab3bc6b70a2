"""What the backward pass would launch: plans, and the page that quotes them."""

from __future__ import annotations

import itertools
import re

import backward_schedule
import numpy as np
import pytest
from emulator import build
from pages import table_of

PAGE = build.ROOT / "docs/backward.md"


def plan_of(emulated, m: int, n: int, k: int, r: int, wanted=("dx", "da", "db"), **options) -> dict:
    """The plan for operands that have no memory."""

    def shaped(rows: int, cols: int) -> np.ndarray:
        one = np.zeros(8, np.uint16)
        return np.lib.stride_tricks.as_strided(one, (rows, cols), (2 * cols, 2))

    sizes = {"dx": (m, k), "da": (r, k), "db": (n, r), "dbias": (1, n)}
    operands = [shaped(*s) for s in ((m, n), (m, k), (n, k), (r, k), (n, r), (m, r))]
    to = {name: shaped(*sizes[name]) for name in wanted}
    return emulated.backward_plan(operands, to, {"multiprocessors": 132} | options)


DROPPED = dict(seed=[1, 2], threshold=1638)


@pytest.mark.parametrize("r", [1, 16, 64, 65, 256, 300])
@pytest.mark.parametrize("m", [1, 200, 4096, 100_000])
@pytest.mark.parametrize("n, k", [(4096, 4096), (14336, 4096), (1024, 8192), (1000, 1000)])
def test_every_plan_fits(emulated, n, k, m, r):
    plan = plan_of(emulated, m, n, k, r)
    assert plan["served"] and plan["overhead"] > 0
    assert plan["form"] == "passes" or (r <= 64 and plan["tile_n"] in (128, 256))
    rows = {64: 512, 128: 256, 256: 128}[plan["rank"]]
    assert plan["rank"] == (64 if r <= 64 else 128 if r <= 128 else 256)
    assert plan["chunks"] == -(-m // rows) or plan["form"] == "one_grid"
    # partial results, dh and what has to be copied, not more
    partials = 4 * (r + 3) * (2 * (m // rows + 2) * (n + k) + m * sum(plan["splits"]))
    turned = plan["form"] == "one_grid" and r <= 16
    packed = 2 * (r + 8) * (n + m) if r % 8 or turned else 0
    dh = 2 * m * (r + 8) * (1 + turned)
    assert plan["workspace_bytes"] <= partials + packed + dh + 4 * m + 4096


def test_the_chunks_depend_on_the_rank_alone(emulated):
    """So dA and dB have the same bits on every device and for every width."""
    for m, r in ((8192, 16), (8192, 100), (1000, 200)):
        chunks = {
            plan_of(emulated, m, n, k, r, form="passes", multiprocessors=count)["chunks"]
            for (n, k), count in itertools.product(((4096, 4096), (512, 8192)), (16, 78, 132))
        }
        assert len(chunks) == 1


def test_the_model_says_what_is_asked_for(emulated):
    """At M = 8192, r = 16: passes within 8 % at 8192 wide; one grid 2 % there, 6 % at 4096."""
    wide, narrow = (8192, 8192, 8192, 16), (8192, 4096, 4096, 16)
    assert plan_of(emulated, *wide, form="passes")["overhead"] < 0.08
    assert plan_of(emulated, *wide)["overhead"] < 0.02
    plain, dropped = (plan_of(emulated, *narrow, **o)["overhead"] for o in ({}, DROPPED))
    assert plain < 0.06 and 0.02 < dropped - plain < 0.06


@pytest.mark.parametrize("options", [{}, DROPPED], ids=["p0", "dropped"])
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("m, n, k", [
    (4096, 4096, 4096), (8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336),
    (8192, 8192, 8192),
])  # fmt: skip
def test_the_closed_form_is_near_a_simulated_schedule(emulated, m, n, k, r, options):
    """The plan has no time to simulate; what it says of one grid is within 2 points of that."""
    plan = plan_of(emulated, m, n, k, r, form="one_grid", **options)
    call = backward_schedule.Call(m, n, k, r, bool(options), plan["tile_n"], plan["clusters"])
    assert abs(plan["overhead"] - call.overhead(emulated)) < 0.02


def test_a_tile_of_192_gives_way_to_one_grid(emulated):
    shape = (2048, 4096, 4608, 16)
    passes = plan_of(emulated, *shape, form="passes")
    assert passes["tile_n"] == 192
    one = plan_of(emulated, *shape, form="one_grid")
    assert one["served"] and one["tile_n"] in (128, 256)


def test_what_one_grid_does_not_serve(emulated):
    shape, given = (512, 512, 512), {"form": "one_grid"}
    for r, wanted, reason in (
        (65, ("dx", "da", "db"), "r is more than 64"),
        (0, ("dx", "da", "db"), "not all three gradients are wanted"),
        (16, ("dx", "da"), "not all three gradients are wanted"),
        (16, ("dx", "da", "db", "dbias"), "the bias is trained"),
    ):
        plan = plan_of(emulated, *shape, r, wanted, **given)
        assert not plan["served"] and plan["reason"] == reason
    plan = plan_of(emulated, *shape, 16, tile_n=192, **given)
    assert not plan["served"] and "tile" in plan["reason"]


def test_the_plan_says_why(emulated):
    shape = (8192, 4096, 4096, 16)
    for options, reason in [
        (dict(compute=80), "compute capability"),
        (dict(sm90a=False), "9.0a"),
    ]:
        plan = plan_of(emulated, *shape, **options)
        assert plan["served"] and "fused_gemm_sm80" in plan["text"] and reason in plan["text"]
    plan = plan_of(emulated, *shape, compute=75)
    assert not plan["served"] and "older" in plan["reason"] and plan["text"] == plan["reason"]
    text = plan_of(emulated, *shape, **DROPPED)["text"]
    for part in (
        "one grid (",
        "16 chunks of dy and of x, these in 8 slices",
        "masked LoRA term",
        "by the model",
    ):
        assert part in text
    text = plan_of(emulated, *shape, form="passes")["text"]
    for part in ("passes (as was asked for)", "dy pass weight_grad_sm90", "chunks of 512 rows"):
        assert part in text
    text = plan_of(emulated, 8192, 4100, 4100, 12)["text"]
    assert "copied first for the gradients of A and B: h, B, x" in text
    assert plan_of(emulated, 64, 64, 64, 8, ())["text"] == "no gradient is needed"
    with pytest.raises(ValueError, match="one_grid, passes"):
        plan_of(emulated, *shape, form="two_launches")


def test_fault_21_what_tma_cannot_count_takes_the_sm_80_kernels(emulated):
    plan = plan_of(emulated, 1 << 31, 8, 8, 8)
    assert plan["served"] and plan["form"] == "passes" and "2^31" in plan["text"]
    for large in ((8, 1 << 31, 8, 8), (8, 8, 1 << 31, 8)):  # what adds partial results counts less
        plan = plan_of(emulated, *large)
        assert not plan["served"] and "2^34" in plan["reason"]


def test_one_grid_takes_no_pass_of_the_sm_80_kernel(emulated):
    """Which serves what is past 32-bit counts of dh, and makes no dh."""
    shape = (1 << 28, 8, 8, 64)
    text = plan_of(emulated, *shape)["text"]
    assert text.startswith("passes (") and "dy pass weight_grad_sm80" in text
    assert "dh down_proj_sm90" in text
    plan = plan_of(emulated, *shape, form="one_grid")
    assert not plan["served"] and "2^34" in plan["reason"]


@pytest.mark.parametrize("name, fields", [
    ("weight_grad_sm90", {}),
    ("backward_sm90", {"x": "dy", "h": "dh", "y": "dx"}),
])  # fmt: skip
def test_launchers_pass_maps_in_the_order_of_the_kernel(name, fields):
    """Tensor maps have one type: an exchange of two would compile, and the emulator has its own."""
    folder = build.ROOT / "csrc/cuda"
    signature = (folder / f"{name}.cuh").read_text().split(f"{name}_kernel(const")[1]
    parameters = re.findall(r"(\w+)_map\b", signature[: signature.index("{")])
    call = (folder / f"{name}.cu").read_text().split("launch_kernel(kernel")[1]
    arguments = re.findall(r"\bmaps\.(\w+)|\b(\w+)_map\b", call[: call.index(";")])
    assert [fields.get(of, of) if of else own for of, own in arguments] == parameters


def test_the_page_quotes_the_model(emulated):
    def percent(plan: dict) -> str:
        return f"{100 * plan['overhead']:.1f}"

    rows = table_of(PAGE, "## Predictions")
    assert len(rows) == 8
    for shape, *cells in rows:
        sizes = [int(number) for number in shape.split(",")]
        for (r, options), cell in zip(
            ((16, {}), (16, DROPPED), (64, {}), (128, {})), cells, strict=True
        ):
            best = plan_of(emulated, *sizes, r, **options)
            passes = plan_of(emulated, *sizes, r, form="passes", **options)
            one = percent(best) if best["form"] == "one_grid" else "-"
            assert cell == f"{one} / {percent(passes)}", (shape, r)


def test_the_page_quotes_the_tiles(emulated):
    shared = emulated.shared_bytes()
    for rank, rows, stages, memory in table_of(PAGE, "## dy and x"):
        subs = int(rows) // 128
        size = shared[f"WeightGradSm90Tile<{rank}, {subs}, {stages}>"]
        assert memory == f"{size / 1024:.0f} KB"

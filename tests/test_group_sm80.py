"""Projections that share x, by the sm_80 kernels: in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulator.suite import SCHEDULES
from test_backward import Step
from test_group_kernels import (
    GROUPS,
    SEEDS,
    assert_like_alone,
    check_backward,
    layers,
    run_backward,
    run_forward,
)

SM80 = {"compute": 80}
# Without those whose copies take many thousand emulated threads, and gigabytes.
LARGE = ("odd_everything", "grouped_queries", "gate_up")
SMALL = {name: shape for name, shape in GROUPS.items() if name not in LARGE}
SOME_SEEDS = {name: SEEDS[name] for name in ("p0", "unaligned")}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_forward_is_that_of_separate_calls(emulated, shape):
    """All y in one launch; each h, which alone depends on the seed, in its own."""
    each = layers(shape, seed=SEEDS["unaligned"])
    each[-1].bias = None
    results, found = run_forward(emulated, each, **SM80)
    assert_like_alone(emulated, each, results, **SM80)
    m, _, projections = shape
    made = [k for k in found["kernels"] if k != "pack"]
    if 0 < m <= 64:  # few rows: a launch each, as alone
        assert made == ["decode"] * len(each)
        return
    with_h = sum(m > 0 and r > 0 for _, r in projections)
    assert made == ["down_proj_sm80"] * with_h + ["fused_gemm_sm80"] * (m > 0)
    assert found["bank_conflicts"] == 0 and found["joined"] == 0


@pytest.mark.parametrize("multiprocessors, tile", [(1, "128x256"), (16, "128x128"), (100, "64x64")])
def test_forward_in_every_tile(emulated, multiprocessors, tile):
    """The tile is chosen for all outputs together: that of a call alone gives the same bits."""
    each = layers((256, 72, ((256, 16), (200, 8), (131, 40))), torch.float16, seed=[1, 2])
    options = SM80 | {"multiprocessors": multiprocessors}
    results, found = run_forward(emulated, each, **options)
    assert f"fused_gemm_sm80 {tile}x32" in found["text"]
    assert_like_alone(emulated, each, results, **options)


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
def test_forward_in_any_timing(emulated, timing, schedule):
    each = layers(GROUPS["parallel_block"], seed=[1, 2])
    results, _ = run_forward(
        emulated, each, timing=timing, schedule=schedule, resident_blocks=2 + schedule, **SM80
    )
    assert_like_alone(emulated, each, results, **SM80)


def test_operands_that_are_copied(emulated):
    """x is copied once; a weight that lies transposed decides how all others are taken."""
    each = layers((70, 72, ((72, 16), (136, 8), (72, 8))), seed=[1, 2])
    for one in each:
        one.x = torch.nn.functional.pad(each[0].x, (1, 0))[:, 1:]
    each[1].weight = each[1].weight.t().contiguous().t()
    each[2].bias = each[2].bias.repeat_interleave(2)[::2]
    results, found = run_forward(emulated, each, **SM80)
    assert_like_alone(emulated, each, results, **SM80)
    assert "MN-major" in found["text"]
    assert found["kernels"] == ["pack", *["down_proj_sm80"] * 3, "fused_gemm_sm80"]


@pytest.mark.parametrize("seed", SOME_SEEDS.values(), ids=SOME_SEEDS)
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_dx(emulated, shape, seed):
    """The sum over the group in one launch, each product under its own mask."""
    each = layers(shape, seed=seed, kind=Step)
    results, found = run_backward(emulated, each, [("dx",)] * len(each), **SM80)
    check_backward(each, results)
    m, _, projections = shape
    made = [k for k in found["kernels"] if k != "pack"]
    has_dx = m > 0 and shape[1] > 0
    with_dh = sum(m > 0 and r > 0 for _, r in projections)
    assert made == ["down_proj_sm80"] * with_dh + ["fused_gemm_sm80"] * has_dx
    assert found["bank_conflicts"] == 0


def test_dx_keeps_a_product_without_a_mask_whole(emulated):
    """Beside one that has a mask, in either order."""
    for whole in (0, 1):
        each = layers((140, 72, ((72, 16), (136, 40))), seed=[1, 2], kind=Step)
        each[whole].seed = None
        results, _ = run_backward(emulated, each, [("dx",)] * 2, **SM80)
        check_backward(each, results)

"""The backward pass by the kernels of sm_80: in the emulator, and on any device with kernels."""

from __future__ import annotations

import pytest
import torch
from emulator.suite import SCHEDULES
from test_backward import MORE, NAMES, STEP_VIEWS, Step, on_device
from test_forward import DTYPES, SEEDS, SHAPES, THRESHOLD
from test_group_kernels import GROUPS, check_backward, layers, run_backward

from lora_kernels import dropout

SM80 = {"compute": 80}
SMALL = {
    name: shape
    for name, shape in (SHAPES | MORE).items()
    if name not in ("more_tiles_than_clusters", "many_splits")
}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_shapes(emulated, shape):
    step = Step(shape, seed=[7, 5, 3, 21])
    (results,), found = step.run(emulated, **SM80)
    step.check(results)
    assert found["bank_conflicts"] == 0 and found["form"] == "passes"
    assert not any("sm90" in kernel for kernel in found["kernels"])


@pytest.mark.parametrize("name", ["one_element", "odd_everything", "rank_64", "no_rank"])
def test_without_dropout(emulated, name):
    step = Step(SHAPES[name])
    (results,), _ = step.run(emulated, **SM80)
    step.check(results)


SUBSETS = {
    (): [],
    ("dx",): ["down_proj_sm80", "fused_gemm_sm80"],
    ("da",): ["down_proj_sm80", "weight_grad_sm80", "reduce"],
    ("db",): ["weight_grad_sm80", "reduce"],
    ("dbias",): ["weight_grad_sm80", "reduce"],
    NAMES: ["weight_grad_sm80", "down_proj_sm80", "fused_gemm_sm80", "weight_grad_sm80", "reduce"],
}


@pytest.mark.parametrize("wanted", SUBSETS, ids="_".join)
def test_only_what_is_wanted_is_computed(emulated, wanted):
    step = Step((140, 136, 200, 16), seed=[1, 2])
    if "da" not in wanted:
        step.without_x()
    (results,), found = step.run(emulated, wanted=wanted, **SM80)
    if results:
        step.check(results)
    assert found["kernels"] == SUBSETS[wanted]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_of_float32(emulated, dtype):
    step = Step((140, 136, 72, 24), dtype, seed=[1, 2, 16, 32], wide=True)
    (results,), _ = step.run(emulated, **SM80)
    step.check(results)


def test_any_timing_gives_the_same_bits(emulated):
    step = Step((300, 136, 136, 40), seed=[1, 2])
    (first,), _ = step.run(emulated, timing="early", **SM80)
    step.check(first)
    for timing, schedule in SCHEDULES:
        (again,), _ = step.run(
            emulated, timing=timing, schedule=schedule, resident_blocks=2 + schedule, **SM80
        )
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("operand", ["dy", "x", "weight", "a", "b", "h"])
@pytest.mark.parametrize("view", STEP_VIEWS.values(), ids=STEP_VIEWS)
def test_any_strides(emulated, view, operand):
    step = Step((70, 72, 72, 24), seed=[1, 2, 3, 5])
    setattr(step, operand, view(getattr(step, operand)))
    (results,), found = step.run(emulated, wanted=NAMES[:3], **SM80)
    step.check(results)
    assert ("copied first" in found["text"]) == ("pack" in found["kernels"])


def test_fault_23_dropped_elements_are_selected_not_multiplied(emulated):
    """Inf under a dropped element of x reaches no gradient; of A only kept elements of dx."""
    m, _, k, _ = shape = (140, 72, 136, 8)
    mask = dropout.reference_mask(torch.tensor([1, 2]), m, k, THRESHOLD)
    row, col = (~mask).nonzero()[300].tolist()
    (clean,), _ = Step(shape, seed=[1, 2]).run(emulated, **SM80)
    step = Step(shape, seed=[1, 2])
    step.x[row, col] = torch.inf
    (found,), _ = step.run(emulated, **SM80)
    assert all(torch.equal(found[name], clean[name]) for name in found)
    step.a[3, col] = torch.inf
    (found,), _ = step.run(emulated, **SM80)
    assert not found["dx"][mask[:, col], col].isfinite().any()
    assert torch.equal(found["dx"][~mask[:, col], col], clean["dx"][~mask[:, col], col])


def test_fault_22_rows_of_dx_are_isolated(emulated):
    """A NaN of dy stays in its row of dx and in its column's dB."""
    step = Step((140, 72, 136, 8), seed=[1, 2])
    (clean,), _ = step.run(emulated, **SM80)
    step.dy[70, 5] = torch.nan
    (found,), _ = step.run(emulated, **SM80)
    rows, columns = torch.arange(140) != 70, torch.arange(72) != 5
    assert found["dx"][70].isnan().all() and torch.equal(found["dx"][rows], clean["dx"][rows])
    assert found["db"][5].isnan().all() and torch.equal(found["db"][columns], clean["db"][columns])


def test_every_launch_may_fail(emulated):
    """The one that fails is the last."""
    step = Step((140, 136, 67, 7))
    _, found = step.run(emulated, **SM80)
    for number in range(len(found["kernels"])):
        _, failed = step.run(emulated, fails=number, **SM80)
        assert failed["kernels"] == found["kernels"][: number + 1]


@pytest.mark.parametrize("seed", [None, [7, 5, 3, 21]], ids=["p0", "unaligned"])
@pytest.mark.parametrize("name", ["qkv", "one_without_rank", "no_depth", "few_rows"])
def test_groups(emulated, name, seed):
    """dx is one sum; x is read by one launch as far as projections share one, with their masks."""
    shape = GROUPS[name]
    each = layers(shape, seed=seed, kind=Step)
    results, found = run_backward(emulated, each, [NAMES] * len(each), **SM80)
    check_backward(each, results)
    assert found["bank_conflicts"] == 0
    assert found["kernels"].count("fused_gemm_sm80") == (shape[0] > 0 and shape[1] > 0)
    assert not any("sm90" in name for name in found["kernels"])


# ---- on a device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize(
    "shape", [*(SHAPES | MORE).values(), (4096, 1536, 2048, 16), (3000, 1000, 1000, 48)]
)
def test_on_the_gpu(shape, seed):
    step = Step(shape, seed=seed)
    step.check(on_device(step, "sm80"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile_n", [128, 256])
def test_every_tile_on_the_gpu(tile_n, dtype):
    for seed in (None, [1, 2]):
        step = Step((2500, 1096, 1800, 24), dtype, seed, wide=True)
        step.check(on_device(step, "sm80", NAMES[:3], tile_n))


@pytest.mark.gpu
@pytest.mark.parametrize("operand", ["dy", "x", "weight", "a", "b", "h"])
@pytest.mark.parametrize("view", STEP_VIEWS.values(), ids=STEP_VIEWS)
def test_any_strides_on_the_gpu(view, operand):
    step = Step((140, 136, 72, 24), seed=[1, 2, 3, 5])
    setattr(step, operand, view(getattr(step, operand)))
    step.check(on_device(step, "sm80", NAMES[:3]))

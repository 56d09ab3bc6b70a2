"""Projections that share x, on Hopper: in the emulator and on a device."""

from __future__ import annotations

import functools

import pytest
import torch
from devices import moved
from emulator.suite import SCHEDULES
from test_backward import NAMES, UP, Step, assert_near
from test_forward import DTYPES, SCALE, THRESHOLD, Layer, bits

from lora_kernels import dropout

# (M, K, (N, r) of each projection): each is there for a reason
GROUPS = {
    "qkv": (300, 200, ((136, 16), (136, 16), (136, 16))),
    "grouped_queries": (520, 136, ((264, 16), (72, 16), (72, 16))),
    "gate_up": (260, 72, ((328, 64), (328, 64))),
    "parallel_block": (140, 136, ((136, 8), (72, 24), (72, 8), (264, 40), (264, 16))),
    "odd_everything": (259, 67, ((131, 7), (9, 3), (40, 33))),
    "ranks_past_a_tile": (140, 72, ((72, 200), (136, 100))),
    "rank_past_a_block": (140, 72, ((72, 300), (40, 8))),
    "one_without_rank": (130, 72, ((72, 16), (136, 0), (72, 8))),
    "one_without_columns": (130, 72, ((0, 16), (136, 8))),
    "no_ranks": (130, 72, ((72, 0), (136, 0))),
    "no_rows": (0, 72, ((72, 8), (136, 8))),
    "no_depth": (20, 0, ((40, 8), (72, 8))),
    "few_rows": (3, 200, ((136, 16), (72, 16))),
    "alone": (300, 200, ((136, 16),)),
}
SEEDS = {
    "p0": None,
    "dropped": [77, 5],
    "sharded": [77, 5, 32, 48],
    "unaligned": [7, 5, 3, 21],
}


def layers(shape, dtype=torch.bfloat16, seed=None, kind=Layer, **options) -> list:
    """A Layer, or Step, of each projection; masks differ."""
    m, k, projections = shape
    found = []
    for i, (n, r) in enumerate(projections):
        own = None if seed is None else [seed[0] + i, *seed[1:]]
        found.append(kind((m, n, k, r), dtype, seed=own, **options))
        found[-1].x = found[0].x
    return found


def own_options(each) -> list[dict]:
    return [{"seed": one.seed or [], "threshold": THRESHOLD} for one in each]


# ---- forward ------------------------------------------------------------------------------------


def run_forward(emulated, each: list[Layer], **options):
    """(y and h of each, what the emulator and the plan say)."""
    results = [tuple(part[0] for part in one.results()) for one in each]
    projections = [
        list(map(bits, (one.weight, one.a, one.b, *result)))
        for one, result in zip(each, results, strict=True)
    ]
    biases = [bits(one.bias) for one in each]
    given = each[0].options(**options)
    found = emulated.forward_group(bits(each[0].x), projections, biases, own_options(each), given)
    return results, found


def assert_like_alone(emulated, each: list[Layer], results, **options) -> None:
    """Bit for bit what each projection gives in a call of its own."""
    for one, (y, h) in zip(each, results, strict=True):
        (y_alone,), (h_alone,), _ = one.run(emulated, **options)
        assert torch.equal(h, h_alone)
        assert torch.equal(y, y_alone)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
def test_forward_is_that_of_separate_calls(emulated, shape, seed):
    each = layers(shape, seed=seed)
    each[-1].bias = None
    results, found = run_forward(emulated, each)
    assert_like_alone(emulated, each, results)
    assert found["bank_conflicts"] == 0
    decoded = found["kernels"].count("decode")  # few rows: a launch each, as alone
    assert decoded == (len(each) if 0 < shape[0] <= 64 else 0)
    assert found["kernels"].count("fused_gemm_sm90") == (shape[0] > 64)


def test_whatever_form_a_call_alone_takes(emulated):
    """All of its forms: h in chains, by either down_proj, ranks beside one another or split."""
    forms = set()
    for multiprocessors, m, k, ranks, seed in (
        (8, 700, 136, (16, 64), [1, 2]),
        (132, 2100, 392, (8, 8), None),
        (132, 72, 136, (16, 40), [1, 2]),
        (132, 40, 136, (16, 40), [1, 2]),
    ):
        each = layers((m, k, [(72, r) for r in ranks]), seed=seed, bias=False)
        options = {"multiprocessors": multiprocessors}
        results, _ = run_forward(emulated, each, **options)
        for one in each:
            found = one.plan(emulated, **options)
            forms.add(found["form"] + (" sm80" if "sm80" in found["text"] else ""))
        assert_like_alone(emulated, each, results, **options)
    assert forms == {"one_launch", "two_launches", "two_launches sm80", "decode"}


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
def test_one_output_by_tma_and_one_by_ordinary_stores(emulated, timing, schedule):
    """Each cluster makes tiles of both, which share the panels that stage them."""
    each = layers((200, 40, ((264, 8), (131, 8))), bias=False)
    options = {"multiprocessors": 2, "timing": timing, "schedule": schedule}
    results, _ = run_forward(emulated, each, **options)
    assert_like_alone(emulated, each, results)


def test_x_is_read_once_for_all_h(emulated):
    """Ranks that fill a tile: the bytes of x, and of nothing else, are saved."""
    m, k = 512, 256
    each = layers((m, k, ((256, 64), (256, 64), (256, 64), (256, 64))), bias=False)
    _, found = run_forward(emulated, each)
    alone = sum(one.run(emulated, form="two_launches")[2]["bytes_loaded"] for one in each)
    assert found["kernels"] == ["down_proj_sm90", "fused_gemm_sm90"]
    assert alone - found["bytes_loaded"] == 3 * 2 * m * k


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
def test_forward_in_any_timing(emulated, timing, schedule):
    each = layers(GROUPS["parallel_block"], seed=[1, 2])
    results, _ = run_forward(
        emulated, each, timing=timing, schedule=schedule, resident_blocks=2 + schedule
    )
    assert_like_alone(emulated, each, results)


def test_operands_that_tma_cannot_address(emulated):
    """x is copied once; a weight that lies transposed decides how all others are taken."""
    each = layers(GROUPS["qkv"], seed=[1, 2])
    for one in each:
        one.x = torch.nn.functional.pad(each[0].x, (1, 0))[:, 1:]
    each[1].weight = each[1].weight.t().contiguous().t()
    each[2].a = each[2].a.t().contiguous().t()
    each[2].bias = each[2].bias.repeat_interleave(2)[::2]
    results, found = run_forward(emulated, each)
    assert_like_alone(emulated, each, results)
    assert "MN-major" in found["text"] and found["kernels"][0] == "pack"


@pytest.mark.parametrize("shape", ["odd_everything", "few_rows"])
def test_every_launch_of_forward_may_fail(emulated, shape):
    each = layers(GROUPS[shape])
    _, found = run_forward(emulated, each)
    for number in range(len(found["kernels"])):
        _, failed = run_forward(emulated, each, fails=number)
        assert failed["kernels"] == found["kernels"][: number + 1]


# ---- backward -----------------------------------------------------------------------------------


def run_backward(emulated, each: list[Step], wanted, **options):
    """(results of each, dx in the first, and what the emulator and the plan say)."""
    results = [
        one.results([n for n in names if n != "dx"])
        for one, names in zip(each, wanted, strict=True)
    ]
    if "dx" in wanted[0]:
        results[0] = each[0].results(("dx",)) | results[0]
    projections = [list(map(bits, (one.dy, one.weight, one.a, one.b, one.h))) for one in each]
    given = each[0].options(**options)
    found = emulated.backward_group(
        bits(each[0].x), projections, [Step.given(r) for r in results], own_options(each), given
    )
    return results, found


def check_backward(each: list[Step], results: list[dict]) -> None:
    """dx against the sum over the group; the others as in a call alone."""
    device = each[0].x.device if not results[0] else next(iter(results[0].values())).device
    exact = [one.exact(device) for one in each]
    for of_one, found in zip(exact, results, strict=True):
        for name, got in found.items():
            if name == "dx":
                assert_near(got, *map(sum, zip(*(e["dx"] for e in exact), strict=True)), "dx")
            else:
                assert_near(got, *of_one[name], name)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
def test_backward(emulated, shape, seed):
    each = layers(shape, seed=seed, kind=Step)
    results, found = run_backward(emulated, each, [NAMES] * len(each))
    check_backward(each, results)
    assert found["bank_conflicts"] == 0
    assert found["kernels"].count("fused_gemm_sm90") == (shape[0] > 0 and shape[1] > 0)


@pytest.mark.parametrize("seed", [None, [1, 2]], ids=["p0", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_several_tiles_and_chunks(emulated, dtype, seed):
    each = layers((1100, 456, ((136, 24), (72, 16), (200, 16))), dtype, seed, Step, wide=True)
    results, found = run_backward(emulated, each, [NAMES] * 3, multiprocessors=6)
    check_backward(each, results)
    assert found["kernels"] == [
        *["weight_grad_sm90"] * 3, "reduce", "fused_gemm_sm90", "weight_grad_sm90", "reduce",
    ]  # fmt: skip


SUBSETS = {
    "dx": ([("dx",)] * 3, ["down_proj_sm90"] * 3 + ["fused_gemm_sm90"]),
    "one_dA": (
        [(), ("da",), ()],
        ["down_proj_sm90", "weight_grad_sm90", "reduce"],
    ),
    "two_dA": (
        [("da",), (), ("da",)],
        ["down_proj_sm90"] * 2 + ["weight_grad_sm90", "reduce"],
    ),
    "dB_and_dx": (
        [("dx", "db"), ("dx",), ("dx", "db")],
        ["weight_grad_sm90", "weight_grad_sm90", "reduce", "down_proj_sm90", "fused_gemm_sm90",
         "reduce"],
    ),
    "one_dbias": ([(), (), ("dbias",)], ["weight_grad_sm90", "reduce"]),
    "nothing": ([(), (), ()], []),
}  # fmt: skip


@pytest.mark.parametrize("wanted, kernels", SUBSETS.values(), ids=SUBSETS)
def test_only_what_is_wanted_is_computed(emulated, wanted, kernels):
    each = layers(GROUPS["qkv"], seed=[1, 2], kind=Step)
    if not any("da" in names for names in wanted):
        each[0].without_x()
    results, found = run_backward(emulated, each, wanted)
    check_backward(each, results)
    assert found["kernels"] == kernels


def test_x_is_read_once_for_all_dA(emulated):
    m, k = 512, 256
    each = layers((m, k, ((256, 16), (256, 16), (256, 16), (256, 16))), kind=Step)
    _, found = run_backward(emulated, each, [("da",)] * 4)
    alone = sum(run_backward(emulated, [one], [("da",)])[1]["bytes_loaded"] for one in each)
    assert found["kernels"] == [*["down_proj_sm90"] * 4, "weight_grad_sm90", "reduce"]
    assert alone - found["bytes_loaded"] == 3 * 2 * m * k


@pytest.mark.parametrize("r, seed, passes", [
    (16, None, 1), (16, [1, 2], 1), (48, None, 1), (48, [1, 2], 3), (72, None, 3),
])  # fmt: skip
def test_projections_share_a_read_of_x_while_that_pays(emulated, r, seed, passes):
    """Up to 128 ranks in all, 64 with masks of their own."""
    each = layers((140, 72, ((72, r), (40, r), (40, r))), seed=seed, kind=Step)
    if r == 48 and passes == 1:
        each = each[:2]
    results, found = run_backward(emulated, each, [("da",)] * len(each))
    check_backward(each, results)
    assert found["kernels"].count("weight_grad_sm90") == passes


def test_dx_is_rounded_once(emulated):
    """Terms far larger than their sum: adding up in 16 bits would leave nothing of it."""
    each = layers((140, 72, ((72, 8), (72, 8), (72, 8))), kind=Step)
    each[1].dy, each[1].weight = each[0].dy * 64, each[0].weight
    each[2].dy, each[2].weight = each[0].dy * -64, each[0].weight
    each[1].a.zero_(), each[2].a.zero_()  # rounding their dh would hide it
    results, _ = run_backward(emulated, each, [("dx",)] * 3)
    check_backward(each, results)
    added = sum(run_backward(emulated, [one], [("dx",)])[0][0]["dx"] for one in each)
    with pytest.raises(AssertionError):
        check_backward(each, [{"dx": added}, {}, {}])


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
def test_backward_in_any_timing(emulated, timing, schedule):
    each = layers(GROUPS["parallel_block"], seed=[1, 2], kind=Step)
    first, _ = run_backward(emulated, each, [NAMES] * 5, timing="early")
    results, _ = run_backward(
        emulated, each, [NAMES] * 5, timing=timing, schedule=schedule, resident_blocks=2 + schedule
    )
    check_backward(each, results)
    for one, other in zip(first, results, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_dropped_elements_of_one_projection_reach_the_others(emulated):
    """An Inf in x that the first mask drops is not seen by its dA; nor is one of A by dx."""
    m, k, _ = shape = (300, 136, ((136, 8), (136, 8)))
    clean = layers(shape, seed=[1, 2], kind=Step)
    masks = [dropout.reference_mask(torch.tensor(one.seed), m, k, THRESHOLD) for one in clean]
    row, col = (~masks[0] & masks[1]).nonzero()[200].tolist()
    wanted = [NAMES[:3]] * 2
    before, _ = run_backward(emulated, clean, wanted)

    each = layers(shape, seed=[1, 2], kind=Step)
    each[0].x[row, col] = torch.inf
    after, _ = run_backward(emulated, each, wanted)
    assert torch.equal(after[0]["da"], before[0]["da"])
    assert not after[1]["da"][:, col].isfinite().any()

    each = layers(shape, seed=[1, 2], kind=Step)
    each[0].a[3, col] = torch.inf
    after, _ = run_backward(emulated, each, wanted)
    dropped = ~masks[0][:, col]
    assert torch.equal(after[0]["dx"][dropped, col], before[0]["dx"][dropped, col])
    assert not after[0]["dx"][~dropped, col].isfinite().any()


def test_operands_of_backward_that_tma_cannot_address(emulated):
    each = layers(GROUPS["odd_everything"], seed=[1, 2], kind=Step)
    each[0].dy = each[0].dy.t().contiguous().t()
    each[1].weight = each[1].weight.t().contiguous().t()
    each[2].h = torch.nn.functional.pad(each[2].h, (3, 0))[:, 3:]
    results, found = run_backward(emulated, each, [NAMES] * 3)
    check_backward(each, results)
    assert found["kernels"][:2] == ["pack", "zero"]


def test_every_launch_of_backward_may_fail(emulated):
    each = layers(GROUPS["odd_everything"], kind=Step)
    wanted = [NAMES, NAMES, ("dx", "da")]
    _, found = run_backward(emulated, each, wanted)
    for number in range(len(found["kernels"])):
        _, failed = run_backward(emulated, each, wanted, fails=number)
        assert failed["kernels"] == found["kernels"][: number + 1]


# ---- on a device --------------------------------------------------------------------------------


def seeds_on_device(each) -> list:
    return [None if one.seed is None else torch.tensor(one.seed, device="cuda") for one in each]


def on_device(each, *names) -> list[list]:
    found = ([getattr(one, name) for one in each] for name in names)
    return [[None if t is None else moved(t, "cuda") for t in part] for part in found]


BIG = {"big": (4096, 2048, ((2048, 16), (512, 16), (512, 16)))}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("shape", (GROUPS | BIG).values(), ids=GROUPS | BIG)
def test_forward_on_the_gpu(hopper, shape, seed):
    each = layers(shape, seed=seed)
    ops, seeds, x = torch.ops.lora_kernels, seeds_on_device(each), moved(each[0].x, "cuda")
    operands = [*on_device(each, "weight", "a", "b", "bias"), seeds]
    keep = 1 if seed is None else (dropout.RANGE - THRESHOLD) / dropout.RANGE
    scales = [SCALE * keep] * len(each), [1.0] * len(each)
    ys, hs = ops.forward_group(x, *operands, THRESHOLD, *scales)
    for one, y, h, *own in zip(each, ys, hs, *operands, strict=True):
        one.check(y, h)
        alone = ops.forward(x, *own, THRESHOLD, SCALE * keep, 1.0)
        assert torch.equal(y, alone[0]) and torch.equal(h, alone[1])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("shape", (GROUPS | BIG).values(), ids=GROUPS | BIG)
def test_backward_on_the_gpu(hopper, shape, seed):
    each = layers(shape, seed=seed, kind=Step, wide=True)
    count = len(each)
    keep = 1 if seed is None else (dropout.RANGE - THRESHOLD) / dropout.RANGE
    for one in each:
        one.db_scale = UP * keep  # ops divide by q where there is a mask: not in dB
    yes = [True] * count
    call = functools.partial(
        torch.ops.lora_kernels.backward_group, moved(each[0].x, "cuda"),
        *on_device(each, "dy", "weight", "a", "b", "h"), seeds_on_device(each), THRESHOLD,
        [SCALE] * count, [UP * keep] * count, yes, yes, True, yes, yes, yes,
    )  # fmt: skip
    dx, *others = call()
    for _ in range(3):
        again, *rest = call()
        assert torch.equal(again, dx)
        for kind, other in zip(others, rest, strict=True):
            assert all(map(torch.equal, kind, other))
    results = [dict(zip(NAMES[1:], own, strict=True)) for own in zip(*others, strict=True)]
    results[0]["dx"] = dx
    check_backward(each, results)

"""The CUDA operators of csrc/torch on CPU tensors (tests/cuda_ops): they take what the CPU's take.

Operands, masks, scales and places of results are those of a GPU; what a launch does is not, and the
emulator's tests are there for that.
"""

from __future__ import annotations

import functools

import cuda_ops
import pytest
import torch
from torch import Tensor

from lora_kernels.schemas import OPS, has_kernel

pytestmark = pytest.mark.skipif(not has_kernel("forward", "CPU"), reason="no C++ library")
CUDA = torch.ops.cuda_ops
SEED, THRESHOLD = torch.tensor([7, 5, 16, 32]), 1 << 13
H_SCALE, UP_SCALE = 0.5, 4.0  # with 1/q = 2 every result is exact, and no scale is another
SHAPE = (18, 40, 24, 8)
ON_DEVICE = ["guard -1", "device -1"]  # of a CPU tensor, whose index no other device has


@pytest.fixture(scope="module")
def device() -> cuda_ops.Device:
    if cuda_ops.compiler() is None:
        pytest.skip("no C++ compiler")
    found = cuda_ops.load()
    found.journal()
    return found


def apart(t: Tensor) -> Tensor:
    """The same values in memory that no call may take as contiguous."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


@functools.cache
def operands(dtype: torch.dtype, strided: bool) -> dict[str, Tensor]:
    """Integers, whose sums round nowhere but in a result. Strided: leading dimensions too."""
    m, n, k, r = SHAPE
    sizes = dict(x=(m, k), weight=(n, k), lora_a=(r, k), lora_b=(n, r), bias=(n,), dy=(m, n))
    generator = torch.Generator().manual_seed(4)
    found = {
        name: torch.randint(-1, 2, size, generator=generator).to(dtype)
        for name, size in (sizes | dict(h=(m, r))).items()
    }
    if not strided:
        return found
    found = {name: apart(t) for name, t in found.items()}
    for name in ("x", "dy"):
        found[name] = found[name].unflatten(0, (3, 2, 3)).transpose(0, 1)
    for name in ("h", "weight"):
        found[name] = found[name].t().contiguous().t()
    return found


def same(got: object, expected: object) -> None:
    """Tensors, or nested sequences of them: contiguous, of the same values, sizes and dtypes."""
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor) and got.dtype == expected.dtype
        assert got.shape == expected.shape and got.is_contiguous()
        assert torch.equal(got, expected)
    else:
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same(one, other)


def both(device: cuda_ops.Device, op: str, *args) -> object:
    """The results of the CUDA operator, which are those of the CPU's."""
    got = getattr(CUDA, op)(*args)
    same(got, getattr(OPS, op)(*args))
    return got


CASES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
LAYOUTS = pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
MASKS = pytest.mark.parametrize("seed", [None, SEED[:2], SEED], ids=["whole", "masked", "window"])


@CASES
@LAYOUTS
@MASKS
def test_each_product_is_the_cpus(dtype, strided, seed, device):
    o = operands(dtype, strided)
    x, h = o["x"], o["h"]
    both(device, "down_proj", x, o["lora_a"], seed, THRESHOLD, H_SCALE)
    for bias in (None, o["bias"]):
        args = (x, o["weight"], h, o["lora_b"], bias, seed, THRESHOLD, UP_SCALE)
        both(device, "fused_gemm", *args)
    for wide, transpose in [(False, False), (True, False), (False, True), (True, True)]:
        both(device, "weight_grad", h, x, seed, THRESHOLD, UP_SCALE, wide, transpose)


@CASES
@LAYOUTS
@MASKS
def test_forward_and_backward_are_the_cpus(dtype, strided, seed, device):
    o = operands(dtype, strided)
    scales = (seed, THRESHOLD, H_SCALE, UP_SCALE)
    w, a, b = o["weight"], o["lora_a"], o["lora_b"]
    for bias in (None, o["bias"]):
        both(device, "forward", o["x"], w, a, b, bias, *scales)
    for wide_a, wide_b in [(False, True), (True, False)]:
        args = (o["dy"], o["x"], w, a, b, o["h"], *scales, wide_a, wide_b)
        for left_out in range(5):  # one gradient, or none
            both(device, "backward", *args, *(i != left_out for i in range(4)))


@CASES
@LAYOUTS
def test_groups_are_the_cpus(dtype, strided, device):
    """Three projections with nothing in common: widths, ranks, scales, masks, biases, gradients."""
    o = operands(dtype, strided)
    w, dy, b = o["weight"], o["dy"], o["lora_b"]
    widths, ranks = (40, 16, 7), (8, 3, 0)
    own = dict(
        weights=[w[:n] for n in widths], lora_as=[o["lora_a"][:r] for r in ranks],
        lora_bs=[b[:n, :r] for n, r in zip(widths, ranks, strict=True)],
        seeds=[SEED, None, SEED[:2]],
    )  # fmt: skip
    scales = (THRESHOLD, [0.5, 1.0, 2.0], [4.0, 2.0, 1.0])
    bias = [None, o["bias"][:16], o["bias"][:7]]
    both(device, "forward_group", o["x"], *list(own.values())[:3], bias, own["seeds"], *scales)
    dys, hs = [dy[..., :n] for n in widths], [o["h"][:, :r] for r in ranks]
    wide = ([True, False, False], [False, True, False])
    every = [True] * 3
    for need_x, *needs in [
        (True, every, every, every),
        (True, [False, True, False], [True, False, False], [False, False, True]),
        (False, [True, False, True], [False, True, True], [True, True, False]),
    ]:
        before = [o["x"], dys, *list(own.values())[:3], hs, own["seeds"], *scales]
        both(device, "backward_group", *before, *wide, need_x, *needs)


@pytest.mark.parametrize("lost", range(4), ids=["M", "N", "K", "r"])
def test_no_rows_columns_depth_or_ranks(lost, device):
    m, n, k, r = (0 if i == lost else size for i, size in enumerate(SHAPE))
    x, w, a, b, dy, h = (
        torch.ones(s, dtype=torch.bfloat16)
        for s in [(m, k), (n, k), (r, k), (n, r), (m, n), (m, r)]
    )
    both(device, "forward", x, w, a, b, None, SEED, THRESHOLD, H_SCALE, UP_SCALE)
    scales = (SEED, THRESHOLD, H_SCALE, UP_SCALE)
    both(device, "backward", dy, x, w, a, b, h, *scales, False, True, True, True, True, True)
    both(device, "weight_grad", h, x, None, 0, 1.0, False, False)
    both(device, "dropout_mask", SEED, m, n, THRESHOLD)


def test_the_mask_is_the_cpus(device):
    for seed in (SEED[:2], SEED):
        both(device, "dropout_mask", seed, 33, 70, THRESHOLD)


# ---- the device ----------------------------------------------------------------------------------


def calls(dtype: torch.dtype = torch.bfloat16, times: int = 1) -> dict:
    """A good call of each operator that launches, and the sizes that its errors name.

    `times`: of so many times the rows.
    """
    o = operands(dtype, False)
    m, n, k, r = SHAPE
    w, a, b = (o[name] for name in ("weight", "lora_a", "lora_b"))
    x, dy, h = (o[name].repeat(times, 1) for name in ("x", "dy", "h"))
    scales, group = (SEED, THRESHOLD, 1.0, 1.0), ([SEED], THRESHOLD, [1.0], [1.0])
    needs = ([True],) * 3
    return {
        "dropout_mask": ((SEED, m, k, THRESHOLD), (m, k)),
        "down_proj": ((x, a, SEED, THRESHOLD, 1.0), (m, r)),
        "fused_gemm": ((x, w, h, b, o["bias"], SEED, THRESHOLD, 1.0), (m, n)),
        "weight_grad": ((h, x, SEED, THRESHOLD, 1.0, False, False), (r, k)),
        "forward": ((x, w, a, b, o["bias"], *scales), (m, n)),
        "backward": ((dy, x, w, a, b, h, *scales, *[False] * 2, *[True] * 4), (m, k)),
        "forward_group": ((x, [w], [a], [b], [o["bias"]], *group), (m, k)),
        "backward_group": (
            (x, [dy], [w], [a], [b], [h], *group, [False], [False], True, *needs), (m, k)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", calls())
def test_a_launch_is_on_the_device_and_the_stream_of_its_tensors(op, device):
    """Current from before the plan until all is launched; the plan is that of this device."""
    device.use(86, 84)
    getattr(CUDA, op)(*calls()[op][0])
    device.use(90, 132)
    first, second, *between, last = device.journal()
    assert [first, second, last] == [*ON_DEVICE, "end"]
    asked = [] if op == "dropout_mask" else ["attribute -1"] * 3
    assert between[: len(asked)] == asked
    target = "" if op in ("dropout_mask", "down_proj") else " compute 86 of 84"
    assert between[-1] == f"{op} stream -1{target}"


@pytest.mark.parametrize("op", calls())
def test_a_launch_that_fails_says_which(op, device):
    """And leaves no error behind for the next, which works."""
    args, (rows, columns) = calls()[op]
    device.next_launch_fails()
    with pytest.raises(RuntimeError, match=rf"{op} \[{rows}, {columns}\]: no such launch"):
        getattr(CUDA, op)(*args)
    assert device.journal()[-2:] == ["forgotten", "end"]
    both(device, op, *args)
    assert "forgotten" not in device.journal()


FORMS = {
    "forward": [
        ("", 0, 0, "two_launches", 90), ("two_launches", 192, 3, "two_launches", 90),
        ("one_launch", 256, 2, "one_launch", 90),
        ("sm80", 0, 0, "two_launches", 80),
    ],
    "backward": [
        ("one_grid", 128, 2, "one_grid", 90), ("passes", 256, 3, "passes", 90),
        ("sm80", 0, 0, "passes", 80),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op, case", [(op, case) for op, some in FORMS.items() for case in some])
def test_a_form_that_is_asked_for_is_launched(op, case, device):
    form, tile_n, group, launched, compute = case
    args, _ = calls(times=70)[op]  # enough rows for any group
    if op == "backward":
        args = (*args[:-1], False)  # one grid makes no dbias
    expected = getattr(CUDA, op)(*args)
    device.journal()
    same(getattr(CUDA, f"{op}_as")(*args, form, tile_n, group), expected)
    *_, plan, launch, _ = device.journal()
    assert launch.endswith(f"compute {compute} of 132")
    words = plan.split()
    assert words[1] == launched and (not tile_n or words[3:] == [str(tile_n), "group", str(group)])


@pytest.mark.parametrize("op", FORMS)
def test_the_plan_that_is_described_is_the_one_that_is_launched(op, device):
    _, x, w, a, b, *_ = calls(times=70)["backward"][0]
    says = {"one_launch": "one launch", "two_launches": "two launches", "one_grid": "one grid"}
    for form, tile_n, group, launched, compute in FORMS[op]:
        text = getattr(CUDA, f"{op}_plan")(x, w, a, b, SEED, form, tile_n, group)
        assert text.startswith(says.get(launched, launched)), text
        assert ("sm80" in text) == (compute == 80) and (not tile_n or f"{tile_n}x64" in text), text
    assert device.journal()[:2] == ON_DEVICE
    assert "down_proj_sm90" in CUDA.down_proj_plan(x, a, SEED)


def test_what_the_library_says_of_itself(device):
    assert CUDA.has_sm90a() and CUDA.max_group() == 5


# ---- what is refused -----------------------------------------------------------------------------


def with_one(args: tuple, i: int, change) -> list:
    """The arguments with the i-th changed, in a list of one too."""
    found = list(args)
    found[i] = [change(found[i][0])] if isinstance(found[i], list) else change(found[i])
    return found


PLACES = [(op, i) for op, (args, _) in calls().items() for i, arg in enumerate(args)
          if isinstance(arg, (Tensor, list)) and op != "dropout_mask"
          and isinstance(arg[0] if isinstance(arg, list) else arg, Tensor)]  # fmt: skip


@pytest.mark.parametrize("op, i", PLACES)
def test_an_operand_of_another_device_is_refused(op, i, device):
    """Of any: x itself makes the next the one that is elsewhere."""
    args = with_one(calls()[op][0], i, lambda t: t.to("meta"))
    with pytest.raises(RuntimeError, match=rf"{op}: \w+ is on device .* must be on that of x"):
        getattr(CUDA, op)(*args)
    assert not any("stream" in line for line in device.journal())


@pytest.mark.parametrize("op, i", PLACES)
def test_an_operand_of_another_dtype_is_refused(op, i, device):
    args = with_one(calls()[op][0], i, Tensor.half)
    with pytest.raises(RuntimeError, match=rf"{op}: (\w+ has dtype|seed must be)"):
        getattr(CUDA, op)(*args)


@pytest.mark.parametrize("op", [op for op in calls() if op != "dropout_mask"])
def test_fp32_is_refused_with_a_remedy(op, device):
    args = calls(torch.float32)[op][0]
    with pytest.raises(RuntimeError, match=rf"{op}: (x|dy) must be bfloat16 or float16 on a"):
        getattr(CUDA, op)(*args)


# Rows of the x of a call that makes y or h alone, ranks, and columns of what a gradient is of.
FREE = {("down_proj", 0, 0), ("down_proj", 1, 0), ("forward", 0, 0), ("forward_group", 0, 0),
        ("weight_grad", 0, 1), ("weight_grad", 1, 1)}  # fmt: skip


@pytest.mark.parametrize("op, i", PLACES)
def test_an_operand_of_another_size_is_refused(op, i, device):
    """One less along any dimension that another operand has too."""
    args, _ = calls()[op]
    first = args[i][0] if isinstance(args[i], list) else args[i]
    for dim in (d for d in range(first.dim()) if (op, i, d) not in FREE):
        short = with_one(args, i, lambda t, dim=dim: t.narrow(dim, 0, t.shape[dim] - 1))
        with pytest.raises(RuntimeError, match=rf"{op}: .*(must be|must have)"):
            getattr(CUDA, op)(*short)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: CUDA.forward_as(*a, "three", 0, 0), "form is 'three'; expected one_launch"),
        (lambda a: CUDA.forward_as(*a, "", 100, 0), "tile_n is 100; expected 128, 192, 256"),
        (lambda a: CUDA.forward_as(*a, "", 1 << 32, 0), "tile_n is 4294967296; expected"),
        (lambda a: CUDA.forward_as(*a, "", -128, 0), "tile_n is -128; expected"),
        (lambda a: CUDA.forward_as(*a, "", 0, -1), "group is -1; expected a number of pairs"),
        (lambda a: CUDA.forward_as(*a, "", 0, 1 << 40), "group is 1099511627776; expected"),
        (lambda a: CUDA.backward_as(*calls()["backward"][0], "decode", 0, 0),
         "form is 'decode'; expected one_grid"),
        (lambda a: CUDA.dropout_mask(SEED, -1, 4, 0), "must not be negative"),
        (lambda a: CUDA.dropout_mask(SEED, 4, -1, 0), "must not be negative"),
    ],
)  # fmt: skip
def test_what_no_kernel_has_is_refused(call, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(calls()["forward"][0])


@pytest.mark.parametrize("op", ["forward_group", "backward_group"])
def test_a_group_has_one_entry_a_projection_and_at_most_five(op, device):
    args, _ = calls()[op]
    lists = [i for i, arg in enumerate(args) if isinstance(arg, list)]
    five, six = ([a * n if i in lists else a for i, a in enumerate(args)] for n in (5, 6))
    both(device, op, *five)
    with pytest.raises(RuntimeError, match=f"{op}: 6 projections, but one call takes 5; split"):
        getattr(CUDA, op)(*six)
    for i in lists:
        more = [a * 2 if j == i else a for j, a in enumerate(args)]
        with pytest.raises(RuntimeError, match=f"{op}: every list must have one entry"):
            getattr(CUDA, op)(*more)

"""The Triton kernels in the interpreter: what the tests of every backend do not ask."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import problems
import pytest
import tolerance
import torch
from tolerance import UNIT
from triton_interpreter import INTERPRETED

import lora_kernels as lk
from lora_kernels import dropout
from lora_kernels.triton_kernels import configs, device, digest

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="on CPU tensors Triton runs in its interpreter alone"
)
THRESHOLD = 3000
SEEDS = {
    "whole": [5, 1 << 40],
    "on_blocks": [-7, 6, 16, 32],
    "off_blocks": [5, 6, 3, 21],
    "last_block": [1 << 50, (1 << 62) + 3, (1 << 33) - 64, (1 << 34) - 80],
}


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def close(got, exact, size, dtype):
    """To one rounding and fp32 sums of `size`, as tests/test_kernels.py's `close`."""
    bound = 1.05 * UNIT[dtype] * exact.abs() + 2.0**-14 * size + 2.0**-24
    assert ((got.double() - exact).abs() <= bound).all()


# ---- the mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_mask_is_bit_identical(seed):
    """By weight_grad of one row a time: its gradient is x's row where the mask keeps it."""
    from lora_kernels.triton_kernels.fused_gemm import fused_gemm

    m, n = 61, 75
    seed = torch.tensor(seed)
    nothing, ones = torch.zeros(m, 0), torch.ones(m, 1)
    y = fused_gemm(
        nothing, torch.zeros(n, 0), ones, torch.ones(n, 1), None, seed, THRESHOLD, 1.0
    )  # fmt: skip
    assert torch.equal(y != 0, dropout.reference_mask(seed, m, n, THRESHOLD))


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("m, k", [(61, 75), (64, 128)], ids=["ragged", "whole_tiles"])
def test_mask_is_alike_in_all_three(m, k, seed):
    from lora_kernels.triton_kernels.down_proj import down_proj
    from lora_kernels.triton_kernels.weight_grad import weight_grad

    seed = torch.tensor(seed)
    kept = dropout.reference_mask(seed, m, k, THRESHOLD)
    scale = (dropout.RANGE - THRESHOLD) / dropout.RANGE  # undoes 1/q
    identity = torch.eye(k)
    h = down_proj(torch.ones(m, k), identity, seed, THRESHOLD, scale)
    assert torch.equal(h.round().bool(), kept)
    grad = weight_grad(torch.eye(m), torch.ones(m, k), seed, THRESHOLD, scale, True, False)
    assert torch.equal(grad.round().bool(), kept)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_fault_23_what_is_dropped_is_selected_away(bad):
    """0 * inf would be NaN: a dropped element must not be multiplied."""
    from lora_kernels.triton_kernels.down_proj import down_proj

    seed = torch.tensor([5, 6])
    kept = dropout.reference_mask(seed, 40, 50, THRESHOLD)
    x = torch.where(kept, 1.0, bad)
    h = down_proj(x, torch.ones(3, 50), seed, THRESHOLD, 1.0)
    assert h.isfinite().all()


# ---- tile plans ----------------------------------------------------------------------------------

TABLE = configs.load()
FAMILIES = [family for family in TABLE["fused_gemm"] if family != "interpreter"]
FAST_PLANS = [("sm90", torch.float16)]
WIDTHS = ("16", "32", "16 scattered", "32 scattered")


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_table_is_whole(kernel):
    for family in (*FAMILIES, "interpreter"):
        assert tuple(TABLE[kernel][family]) == WIDTHS
        for rows in TABLE[kernel][family].values():
            limits = [row["up_to"] for row in rows]
            if kernel == "down_and_weight_grad" and not rows:
                continue  # it is an alternative
            assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
            for row in rows:
                assert row.get("kind", "grid") in configs.KINDS
                sides = [row[name] for name in ("rows", "cols", "depth", "rank") if row[name]]
                assert all(side & (side - 1) == 0 and side >= 16 for side in sides)


def check_gemm(m, n, k, r, dtype, seed, mn_major):
    from lora_kernels.triton_kernels.fused_gemm import fused_gemm

    x, h = normal(m, k, dtype=dtype), normal(m, r, dtype=dtype, seed=1)
    weight = normal(k, n, dtype=dtype, seed=2).t() if mn_major else normal(n, k, dtype=dtype)
    up, bias = normal(n, r, dtype=dtype, seed=3), normal(n, dtype=dtype, seed=4)
    y = fused_gemm(x, weight, h, up, bias, seed, THRESHOLD, 0.75)
    term, size = (
        0.75 * h.double() @ up.double().t(),
        0.75 * h.double().abs() @ up.double().abs().t(),
    )
    if seed is not None:
        inverse = dropout.inverse_keep(THRESHOLD)
        kept = dropout.reference_mask(seed, m, n, THRESHOLD)
        term, size = torch.where(kept, term * inverse, 0), size * inverse
    exact = x.double() @ weight.double().t() + term + bias.double()
    size = size + x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    close(y, exact, size, dtype)


@pytest.mark.parametrize("mn_major", [False, True], ids=["K_major", "MN_major"])
@pytest.mark.parametrize("seed", [None, [5, 6], [5, 6, 3, 21]], ids=["p0", "whole", "off_blocks"])
@pytest.mark.parametrize("kind", configs.KINDS)
def test_kinds_of_gemm(kind, seed, mn_major, monkeypatch):
    """20 tiles, ragged edges, a last group of one row: more than there are persistent programs."""
    plan = configs.Config(16, 32, 32, 16, 4, 2, 4, kind, group=2)
    monkeypatch.setattr(configs, "lookup", lambda *about: plan)
    described = []
    real = device.descriptor
    monkeypatch.setattr(device, "descriptor", lambda *a: described.append(a) or real(*a))
    check_gemm(70, 120, 72, 19, torch.float16, seed and torch.tensor(seed), mn_major)
    assert bool(described) == (kind == "descriptors")


def test_descriptors_only_of_what_tma_addresses():
    whole = torch.empty(64, 64, dtype=torch.float16)
    assert device.describable(whole) and device.describable(whole[:7, :5])
    assert not device.describable(whole[:, 4:])  # begins off 16 bytes
    assert not device.describable(torch.empty(64, 60, dtype=torch.float16))  # rows off 16 bytes
    assert not device.describable(whole.t()) and not device.describable(whole[:1].expand(9, 64))
    assert not device.describable(whole[:0])
    for size in ((2**31, 8), (8, 2**31)):
        assert not device.describable(torch.empty(size, dtype=torch.float16, device="meta"))


@pytest.mark.parametrize(
    "family, dtype",
    [
        pytest.param(f, d, marks=() if (f, d) in FAST_PLANS else pytest.mark.slow)
        for f, d in itertools.product(FAMILIES, (torch.float16, torch.float32))
    ],
    ids=str,
)
def test_plans_of_every_family_are_right(family, dtype, monkeypatch):
    """Tiles of the GPUs' own table, some not whole, at a rank of two blocks."""
    monkeypatch.setattr(device, "family", lambda of: family)
    for r in (20, 72) if dtype == torch.float16 else (72,):
        problem = problems.make((130, 264, 136, r), dtype, dropout_p=0.2)
        tolerance.assert_c1(problem, problem.run("triton"))


@pytest.mark.parametrize("length, others", [(1, 1), (100, 1), (4096, 3), (8192, 500), (10**6, 1)])
def test_split_covers_the_sum(length, others):
    plan = configs.Config(64, 64, 64, 16, 4, 2, programs=264)
    span, count = plan.split(length, others, 64)
    assert span % 64 == 0 and (count - 1) * span < length <= count * span
    assert count <= configs.MOST_SPLITS


@pytest.mark.parametrize("seed", [None, [5, 6], [5, 6, 3, 21]], ids=["p0", "whole", "off_blocks"])
def test_split_sums_are_right(seed):
    """Sums of 520 columns and of 520 rows, in two parts each."""
    from lora_kernels.triton_kernels.down_proj import down_proj
    from lora_kernels.triton_kernels.weight_grad import grad_and_sums

    seed, q = None if seed is None else torch.tensor(seed), 1.0
    if seed is not None:
        q = 1 / dropout.inverse_keep(THRESHOLD)
    for m, k in ((20, 520), (520, 20)):
        x, a, h = normal(m, k), normal(5, k, seed=1), normal(m, 5, seed=2)
        xd = x.double() / q
        if seed is not None:
            xd = torch.where(dropout.reference_mask(seed, m, k, THRESHOLD), xd, 0)
        got = down_proj(x, a, seed, THRESHOLD, 0.75)
        close(got, 0.75 * xd @ a.double().T, xd.abs() @ a.double().abs().T, torch.float32)
        got, sums = grad_and_sums(h, x, seed, THRESHOLD, 0.75, False, False, True)
        close(got, 0.75 * h.double().T @ xd, h.double().abs().T @ xd.abs(), torch.float32)
        close(sums, x.double().sum(0), x.double().abs().sum(0), torch.float32)


def test_few_tiles_are_smaller_ones():
    """What rows alone would give the large tile, of which too few would run."""
    large = configs.lookup("fused_gemm", "sm90", "16", 8192, 4096)
    few = configs.lookup("fused_gemm", "sm90", "16", 1024, 1024)
    assert few.rows * few.cols < large.rows * large.cols


# ---- promises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [9, 72], ids=["one_read", "two_reads"])
def test_same_bits_every_time(r):
    """Of each gradient too, whichever others are wanted; one that is not is empty."""
    from lora_kernels.triton_kernels import flow

    x, dy = normal(520, 40), normal(520, 48)  # two chunks of rows
    weight, a, b = normal(48, 40), normal(r, 40), normal(48, r)

    def run(*needs):
        y, h = flow.forward(x, weight, a, b, None, None, 0, 1.5, 1.0)
        return y, *flow.backward(dy, x, weight, a, b, h, None, 0, 1.5, 1.0, False, False, *needs)

    first = run(True, True, True, True)
    for got, want in zip(run(True, True, True, True), first, strict=True):
        assert torch.equal(got, want)
    for needed in range(4):
        _, *grads = run(*(i == needed for i in range(4)))
        assert torch.equal(grads.pop(needed), first[1 + needed]), "depends on what is needed"
        assert all(grad.shape == (0,) for grad in grads)


def test_one_read_of_many_tiles():
    """Rows of several blocks, each of which meets columns of several tiles in one program."""
    from lora_kernels.triton_kernels import weight_grad

    m, n, r = 150, 200, 5
    dy, h, down = (normal(*s) for s in ((m, n), (m, r), (r, n)))
    assert weight_grad.one_read(dy, r)
    dh, grad, sums = weight_grad.down_and_weight_grad(h, dy, down, 0.5, 0.25, False, True, True)
    wide = (dy.double(), h.double(), down.double())
    for got, left, right, scale in (
        (dh, wide[0], wide[2].T, 0.5),
        (grad, wide[0].T, wide[1], 0.25),
        (sums[:, None], wide[0].T, torch.ones(m, 1).double(), 1.0),
    ):
        close(got, scale * left @ right, left.abs() @ right.abs(), torch.float32)


def test_h_of_any_layout():
    """Hooks of saved tensors may give it back in another."""
    from lora_kernels.triton_kernels import flow

    x, dy, weight = normal(40, 24), normal(40, 32), normal(32, 24)
    a, b, h = normal(5, 24), normal(32, 5), normal(40, 5)
    scalars = (None, 0, 1.0, 1.0, False, False, True, True, True, True)
    want = flow.backward(dy, x, weight, a, b, h, *scalars)
    got = flow.backward(dy, x, weight, a, b, h.t().contiguous().t(), *scalars)
    assert all(map(torch.equal, got, want))


def test_fault_22_a_row_depends_on_no_other():
    from lora_kernels.triton_kernels import flow

    x, weight, a, b = normal(100, 64), normal(48, 64), normal(8, 64), normal(48, 8)
    spoilt = x.clone()
    spoilt[57] = torch.nan
    y, _ = flow.forward(x, weight, a, b, None, None, 0, 1.0, 1.0)
    got, _ = flow.forward(spoilt, weight, a, b, None, None, 0, 1.0, 1.0)
    others = torch.arange(100) != 57
    assert torch.equal(got[others], y[others]) and got[57].isnan().all()


def test_fault_20_offsets_past_32_bits():
    """Rows, or the steps of a sum, so far apart that 32 bits do not count the elements between."""
    from lora_kernels.triton_kernels.down_proj import down_proj
    from lora_kernels.triton_kernels.fused_gemm import fused_gemm
    from lora_kernels.triton_kernels.weight_grad import down_and_weight_grad, weight_grad

    tall, wide, h = (normal(*size, dtype=torch.float16) for size in ((66, 5), (5, 66), (3, 5)))

    def down(x):
        return [down_proj(x, wide[:, : x.shape[1]], None, 0, 1.0)]

    def grad(x):
        return [weight_grad(tall[: len(x)], x, None, 0, 1.0, False, False)]

    def gemm(x):
        return [fused_gemm(x, wide[:, : x.shape[1]], h, tall[:5], None, None, 0, 1.0)]

    def gemm_of_weight(weight):
        return [fused_gemm(wide[:, : weight.shape[1]], weight, tall[:5], h, None, None, 0, 1.0)]

    def one_read(dy):
        down = wide[:, : dy.shape[1]]
        return down_and_weight_grad(h, dy, down, 1.0, 1.0, False, True, True)

    far = torch.empty(34 << 26, dtype=torch.float16)
    for size, strides, runs in (
        ((3, 40), (1 << 30, 1), (down, grad, gemm, gemm_of_weight, one_read)),
        ((3, 66), (1, 1 << 25), (down, grad, one_read)),  # in steps or tiles of 64 columns
        ((66, 3), (1 << 25, 1), (grad,)),  # of 64 rows
        ((3, 34), (1, 1 << 26), (gemm, gemm_of_weight)),  # of 32
    ):
        near = normal(*size, dtype=torch.float16)
        apart = far.as_strided(size, strides).copy_(near)
        for run in runs:
            assert all(map(torch.equal, run(apart), run(near))), f"{run.__name__} of {strides}"


def test_fault_21_more_rows_than_are_counted():
    with pytest.raises(RuntimeError, match=r"up to \d+, but x is \[2147483648, 8\].*'composed'"):
        device.rows_of(torch.ones(1, 8).expand(1 << 31, 8))


@pytest.mark.parametrize("matmul, expected", [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_tf32_only_where_torch_allows_it(matmul, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", matmul)
    assert device.precision(torch.empty(1)) == expected
    assert device.precision(torch.empty(1, dtype=torch.float16)) == "ieee"
    why = device.prefers(torch.device("cuda"), torch.float32)
    assert (why is None) == (expected == "ieee")


# ---- what cannot be served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, message",
    [("", "not installed: pip install triton"), ("3.5.1", "is 3.5.1, expected 3.6 or newer")],
)
def test_missing_triton_says_how_to_get_it(version, message, monkeypatch):
    monkeypatch.setattr(digest, "triton_version", lambda: version)
    assert message in lk.backends()["triton"]
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: Triton"):
        lk.fused_lora_linear(
            x, torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), backend="triton"
        )


@pytest.mark.parametrize(
    "where, dtype, message",
    [
        ("cpu", torch.float64, "no torch.float64 kernels"),
        ("meta", torch.float32, "TRITON_INTERPRET is set, which runs the kernels on a CPU"),
    ],
)
def test_refusals(where, dtype, message):
    assert message in device.refuses(torch.device(where), dtype)


@pytest.mark.parametrize(
    "capability, served, family",
    [((7, 5), False, "sm80"), ((8, 0), True, "sm80"), ((9, 0), True, "sm90"),
     ((10, 0), True, "sm100"), ((12, 0), True, "sm80")],
)  # fmt: skip
def test_each_device_has_the_plans_of_its_family(capability, served, family, monkeypatch):
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: capability)
    gpu = torch.device("cuda", 0)
    assert (device.refuses(gpu, torch.float16) is None) == served
    assert device.family.__wrapped__(gpu) == family


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)


CALL = """
import torch, lora_kernels as lk
x = torch.ones(4, 8, dtype=torch.{dtype})
y = lk.fused_lora_linear(x, x, x[:2], x[:, :2], backend={backend!r})
"""


def test_an_interpreter_that_is_wrong_is_refused():
    """Of bfloat16 Triton's own interpreter multiplies the bits: no result is better."""
    done = run_python(CALL.format(dtype="bfloat16", backend="triton"), TRITON_INTERPRET="1")
    assert "multiplies bfloat16 as if it were integers" in done.stderr
    done = run_python(CALL.format(dtype="float16", backend="triton"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_kernels_are_imported_when_they_are_called():
    check = "import sys\nassert 'lora_kernels.triton_kernels.down_proj' not in sys.modules"
    done = run_python(CALL.format(dtype="float32", backend=None) + check)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_it_says_so():
    done = run_python("import lora_kernels as lk; print(lk.backends()['triton'])")
    assert "torch sees no GPU" in done.stdout

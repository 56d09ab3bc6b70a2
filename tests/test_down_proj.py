"""The CUDA down_proj kernels, sm_80 and sm_90a, in the emulator and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import moved
from test_kernels import close

from lora_kernels import dropout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# (M, K, r): each is there for a reason
SHAPES = {
    "one_element": (1, 1, 1),
    "one_tile": (64, 64, 16),
    "all_tails": (70, 200, 24),
    "deeper_than_the_ring": (66, 1096, 8),
    "ring_wraps_unevenly": (64, 72, 32),
    "rank_64": (80, 136, 64),
    "rank_past_a_panel": (65, 136, 72),
    "rank_256": (64, 264, 256),
    "rank_past_one_block": (20, 40, 300),
    "tall": (300, 128, 16),
    "odd_everything": (33, 47, 7),
}
SEEDS = {"p0": None, "dropped": [77, 5], "sharded": [77, 5, 32, 48], "unaligned": [7, 5, 3, 21]}
THRESHOLD = 3000
SMALL, LARGE = 1, 1000  # multiprocessors: tall tiles fill few, many take low ones


def bits(t: torch.Tensor) -> np.ndarray:
    """The same memory, strides included, as uint16."""
    return t.view(torch.uint16).numpy()


def run(emulated, x, down, seed=None, scale=-1.5, compute=90, multiprocessors=SMALL, **schedule):
    """(h, what the emulator and the plan say)."""
    h = torch.empty(x.shape[0], down.shape[0], dtype=x.dtype)
    arrays = (bits(x), bits(down), bits(h))
    plan = emulated.plan(*arrays, seed or [], compute, multiprocessors)
    found = emulated.down_proj(
        *arrays, x.dtype == torch.bfloat16, seed or [], THRESHOLD, scale, compute, multiprocessors,
        **schedule,
    )  # fmt: skip
    return h, plan | found


def problem(shape, dtype=torch.bfloat16, mn_major=False):
    m, k, r = shape
    g = torch.Generator().manual_seed(7 * m + 3 * k + r)
    x, down = torch.randn(m, k, generator=g), torch.randn(r, k, generator=g)
    down = down.to(dtype)
    return x.to(dtype), down.t().contiguous().t() if mn_major else down


def check(h, x, down, seed, scale=-1.5):
    """C1 against float64. The factor 1/q is the caller's, inside `scale`."""
    xd = x.double()
    if seed is not None:
        mask = dropout.reference_mask(torch.tensor(seed, device=x.device), *x.shape, THRESHOLD)
        xd = torch.where(mask, xd, 0)
    total = abs(scale) * xd.abs() @ down.double().abs().T
    close(h, scale * xd @ down.double().T, total, x.shape[1] + 4)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("mn_major", [False, True], ids=["k_major", "mn_major"])
@pytest.mark.parametrize("compute, multiprocessors", [(90, SMALL), (80, SMALL), (80, LARGE)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(emulated, shape, compute, multiprocessors, mn_major, seed):
    x, down = problem(shape, mn_major=mn_major)
    h, _ = run(emulated, x, down, seed, compute=compute, multiprocessors=multiprocessors)
    check(h, x, down, seed)


@pytest.mark.parametrize("timing", ["early", "late", "random"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("compute", [80, 90])
def test_any_timing_gives_the_same_bits(emulated, compute, dtype, timing):
    x, down = problem((200, 328, 24), dtype)
    first, _ = run(emulated, x, down, [1, 2], compute=compute, timing="early")
    check(first, x, down, [1, 2])
    for schedule in range(6):
        h, _ = run(
            emulated, x, down, [1, 2], compute=compute, timing=timing, schedule=schedule,
            resident_blocks=1 + schedule,
        )  # fmt: skip
        assert torch.equal(h, first)


@pytest.mark.parametrize("compute", [80, 90])
def test_x_is_read_once(emulated, compute):
    """x once, `down` once for each block, and no bank conflict of any matrix load."""
    x, down = problem((256, 512, 16))
    _, found = run(emulated, x, down, [1, 2], compute=compute)
    assert found["bytes_loaded"] == 2 * (x.numel() + found["blocks"] * down.numel())
    assert found["bank_conflicts"] == 0


@pytest.mark.parametrize("compute", [80, 90])
def test_fault_22_rows_are_isolated(emulated, compute):
    """NaN and Inf stay in their row; a dropped one vanishes."""
    x, down = problem((70, 136, 8))
    clean, _ = run(emulated, x, down, [1, 2], compute=compute)
    mask = dropout.reference_mask(torch.tensor([1, 2]), *x.shape, THRESHOLD)
    kept, dropped = mask.nonzero()[500].tolist(), (~mask).nonzero()[300].tolist()
    x[kept[0], kept[1]] = torch.nan
    x[dropped[0], dropped[1]] = torch.inf
    h, _ = run(emulated, x, down, [1, 2], compute=compute)
    assert kept[0] != dropped[0] and h[kept[0]].isnan().all()
    others = torch.arange(70) != kept[0]
    assert torch.equal(h[others], clean[others])


VIEWS = {
    "offset_by_one": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "padded_rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "odd_row_stride": lambda x: torch.cat([x, x], 1)[:, : x.shape[1] * 2 - 1][:, : x.shape[1]],
    "every_other_row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "every_other_column": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "one_row_repeated": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("operand", ["x", "down"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("compute", [80, 90])
def test_any_strides(emulated, compute, view, operand):
    """What TMA or 16-byte copies cannot address is loaded element by element, inside the op."""
    x, down = problem((70, 136, 24))
    if operand == "x":
        x = view(x)
    else:
        down = view(down)
    h, found = run(emulated, x, down, [1, 2, 3, 5], compute=compute)
    check(h, x, down, [1, 2, 3, 5])
    if found["kernel"] == "sm80":
        assert found["reason"] and "sm80" in found["kernels"][0]


@pytest.mark.parametrize("shape", [(0, 8, 4), (5, 0, 4), (5, 8, 0)])
def test_empty(emulated, shape):
    x, down = problem(shape)
    h, found = run(emulated, x, down)
    assert not h.any() and len(found["kernels"]) == (min(shape[0], shape[2]) > 0)


def plan_of(emulated, m, k, r, compute=90, multiprocessors=132, seed=None, mn_major=False):
    x, h = np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.uint16)
    x = np.lib.stride_tricks.as_strided(x, (m, k), (2 * k, 2))
    strides = (2, 2 * r) if mn_major else (2 * k, 2)
    down = np.lib.stride_tricks.as_strided(h, (r, k), strides)
    h = np.lib.stride_tricks.as_strided(h, (m, r), (2 * r, 2))
    return emulated.plan(x, down, h, seed or [], compute, multiprocessors)


@pytest.mark.parametrize("r", [1, 8, 16, 17, 32, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("m", [1, 100, 2048, 8192, 1 << 20])
def test_every_plan_fits(emulated, m, r):
    """A tile exists for every rank, and fits the shared memory of the smallest device it is for."""
    for compute in (80, 86, 90, 120):
        for mn_major in (False, True):
            p = plan_of(emulated, m, 4096, r, compute, mn_major=mn_major)
            assert p["rank"] * p["rank_blocks"] >= r and p["blocks"] * p["rows"] >= m
            assert p["shared_bytes"] <= (227 if p["kernel"] == "sm90" else 99) << 10
            assert p["kernel"] == "sm80" or compute == 90


def test_the_plan_says_why(emulated):
    assert plan_of(emulated, 8192, 4096, 16)["kernel"] == "sm90"
    for arguments, reason in [
        (dict(m=8192, k=4096, r=16, compute=80), "compute capability"),
        (dict(m=8192, k=4100, r=16), "TMA cannot address x"),
        (dict(m=8192, k=4096, r=12, mn_major=True), "TMA cannot address A or B"),
        (dict(m=8192, k=4096, r=16, mn_major=True, seed=[1, 2]), "dropout with a transposed A"),
        (dict(m=64, k=4096, r=16), "too few rows"),
    ]:
        found = plan_of(emulated, **arguments)
        assert found["kernel"] == "sm80" and reason in found["reason"]
        assert "down_proj_sm80" in found["text"] and reason in found["text"]


def test_a_build_without_sm90a_has_no_sm90_plan(emulated):
    """Its kernels would be empty."""
    x = np.zeros((4096, 64), np.uint16)
    arrays = (x, x[:16], np.zeros((4096, 16), np.uint16))
    assert emulated.plan(*arrays, [], 90, 132)["kernel"] == "sm90"
    found = emulated.plan(*arrays, [], 90, 132, sm90a=False)
    assert found["kernel"] == "sm80" and "9.0a" in found["reason"]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("mn_major", [False, True], ids=["k_major", "mn_major"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (8192, 4096, 16), (3000, 1024, 200)])
def test_on_the_gpu(shape, dtype, mn_major, seed):
    """The same on a device; twice, bit for bit the same."""
    x, down = problem(shape, dtype, mn_major)
    on = {"x": moved(x, "cuda"), "down": moved(down, "cuda")}
    seeds = None if seed is None else torch.tensor(seed, device="cuda")
    keep = 1 if seed is None else (dropout.RANGE - THRESHOLD) / dropout.RANGE
    calls = [
        torch.ops.lora_kernels.down_proj(on["x"], on["down"], seeds, THRESHOLD, -1.5 * keep)
        for _ in range(2)
    ]
    assert torch.equal(*calls)
    check(calls[0], on["x"], on["down"], seed)


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_on_the_gpu(view):
    x, down = problem((700, 136, 24))
    x = view(x.cuda())
    h = torch.ops.lora_kernels.down_proj(x, down.cuda(), None, 0, -1.5)
    check(h.cpu(), x.cpu(), down, None)

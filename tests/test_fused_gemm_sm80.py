"""fused_gemm by cp.async and mma.sync: in the emulator, and on any device with kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator.suite import SCHEDULES
from test_forward import DTYPES, SEEDS, SHAPES, THRESHOLD, VIEWS, Layer, bits, on_device
from test_kernels import close

from lora_kernels import dropout

SM80 = {"form": "two_launches", "compute": 80}
TILES = (64, 128, 256)
# y depends on the seed through h alone, which down_proj makes: one seed will do.
SMALL = {name: shape for name, shape in SHAPES.items() if name != "more_tiles_than_clusters"}


@pytest.mark.parametrize("seed", [None, [7, 5, 3, 21]], ids=["p0", "unaligned"])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_shapes(emulated, shape, seed):
    layer = Layer(shape, seed=seed)
    (y,), (h,), found = layer.run(emulated, **SM80)
    layer.check(y, h)
    assert found["bank_conflicts"] == 0
    assert not any("sm90" in kernel for kernel in found["kernels"])


class Product:
    """Operands of fused_gemm alone, as backward calls it: h given, maybe a mask on its term."""

    def __init__(self, shape, dtype=torch.bfloat16, mn_major=False, seed=None, bias=True):
        m, n, _, r = shape
        self.layer, self.seed, self.shape = Layer(shape, dtype, bias), seed, shape
        self.h = torch.randn(m, r, generator=torch.Generator().manual_seed(1)).to(dtype)
        if mn_major:
            layer = self.layer
            layer.weight, layer.b = (VIEWS["transposed"](t) for t in (layer.weight, layer.b))
        self.y = torch.empty(m, n, dtype=dtype)

    def run(self, emulated, scale=1.0, **options) -> dict:
        layer = self.layer
        given = layer.options(scale=(0.0, scale), compute=80, **options)
        if self.seed:
            given |= {"seed": self.seed, "threshold": THRESHOLD}
        found = emulated.fused_gemm(
            *map(bits, (layer.x, layer.weight, self.h, layer.b, layer.bias, self.y)), given
        )
        assert found["bank_conflicts"] == 0
        return found

    def check(self, scale=1.0) -> None:
        m, n, k, r = self.shape
        x, w, b = (t.double() for t in (self.layer.x, self.layer.weight, self.layer.b))
        term, size = scale * self.h.double() @ b.T, abs(scale) * self.h.double().abs() @ b.abs().T
        if self.seed:
            kept = dropout.reference_mask(torch.tensor(self.seed), m, n, THRESHOLD)
            term, size = (torch.where(kept, t, 0) for t in (term, size))
        exact, total = x @ w.T + term, x.abs() @ w.abs().T + size
        if self.layer.bias is not None:
            bias = self.layer.bias.double()
            exact, total = exact + bias, total + bias.abs()
        close(self.y, exact, total, k + r + 5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mn_major", [False, True], ids=["k_major", "mn_major"])
@pytest.mark.parametrize("tile_n", TILES)
def test_every_tile(emulated, tile_n, mn_major, dtype):
    """An edge of rows and of columns, more stages than the ring has, a bias or none."""
    for bias in (True, False):
        product = Product((140, tile_n + 72, 264, 24), dtype, mn_major, bias=bias)
        found = product.run(emulated, tile_n=tile_n)
        product.check()
        assert found["tile_n"] == tile_n and found["mn_major"] == mn_major


@pytest.mark.parametrize("seed", [s for s in SEEDS.values() if s], ids=[n for n in SEEDS][1:])
@pytest.mark.parametrize("rank", [1, 16, 72, 200])
@pytest.mark.parametrize("tile_n", TILES)
def test_the_masked_term(emulated, tile_n, rank, seed):
    """Of ranks in less than a stage, in several, in more than the ring has; groups that straddle
    fragments too."""
    product = Product((140, tile_n + 24, 72, rank), mn_major=True, seed=seed)
    product.run(emulated, scale=1.5, tile_n=tile_n)
    product.check(scale=1.5)


def test_without_depth_the_masked_term_is_all(emulated):
    product = Product((70, 72, 0, 24), mn_major=True, seed=[7, 5], bias=False)
    product.run(emulated)
    product.check()


@pytest.mark.parametrize("scale", [4.0, 2.0**-12, -1.5, 0.0])
@pytest.mark.parametrize("rank", [7, 40])
def test_a_scale_costs_no_accuracy(emulated, rank, scale):
    product = Product((70, 136, 72, rank), torch.float16)
    if scale == 0.0:
        product.h[7, 3] = torch.inf  # has no part in y
    product.run(emulated, scale)
    if scale == 0.0:
        product.h[7, 3] = 0
    product.check(scale)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("tile_n", TILES)
def test_any_timing_gives_the_same_bits(emulated, tile_n, masked):
    product = Product((70, 136, 136, 40), mn_major=True, seed=[7, 5] if masked else None)
    product.run(emulated, tile_n=tile_n, timing="early")
    product.check()
    first = product.y.clone()
    for timing, schedule in [*SCHEDULES, ("random", 4)]:
        product.run(
            emulated, tile_n=tile_n, timing=timing, schedule=schedule, resident_blocks=1 + schedule
        )
        assert torch.equal(product.y, first)


def test_every_tile_has_the_same_bits(emulated):
    """A column's order of sums is that of the depth, whatever tile it stands in."""
    found = []
    for tile_n in TILES:
        product = Product((140, 264, 136, 24))
        product.run(emulated, tile_n=tile_n)
        found.append(product.y)
    assert all(torch.equal(y, found[0]) for y in found)


def test_fault_23_what_is_masked_is_selected_not_multiplied(emulated):
    """Inf of a row of h reaches kept elements alone; NaN of x stays in its row."""
    seed = [7, 5]
    product = Product((70, 72, 72, 8), mn_major=True, seed=seed)
    product.run(emulated)
    clean = product.y.clone()
    product.h[3] = torch.inf
    product.layer.x[9, 5] = torch.nan
    product.run(emulated)
    kept = dropout.reference_mask(torch.tensor(seed), 70, 72, THRESHOLD)
    others = torch.ones_like(kept)
    others[3], others[9] = ~kept[3], False
    assert (~kept[3]).any() and torch.equal(product.y[others], clean[others])
    assert not product.y[3][kept[3]].isfinite().any() and product.y[9].isnan().all()


@pytest.mark.parametrize("operand", ["x", "weight", "a", "b"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(emulated, view, operand):
    """Rows that are not on 16-byte boundaries are copied inside, and the plan says so."""
    layer = Layer((70, 72, 72, 24), seed=[1, 2, 3, 5])
    setattr(layer, operand, view(getattr(layer, operand)))
    (y,), (h,), found = layer.run(emulated, **SM80)
    layer.check(y, h)
    assert ("copied first" in found["text"]) == ("pack" in found["kernels"])


def test_strided_results(emulated):
    """A y of odd rows, to whose neighbours nothing is written, and a bias of every other one."""
    layer = Layer((70, 75, 72, 24))
    layer.bias = torch.stack([layer.bias, torch.full_like(layer.bias, torch.nan)], 1)[:, 0]
    around = torch.zeros(70, 79, dtype=layer.dtype)
    y, h = around[:, 1:76], torch.empty(70, 24, dtype=layer.dtype)
    found = emulated.forward(*layer.operands(), [bits(y)], [bits(h)], layer.options(**SM80))
    layer.check(y, h)
    assert not found["y_vectors"] and "bias" in found["text"]
    assert around[:, 76:].isnan().sum() == 3 * 69 and around[0, 0] == 0  # poison lies untouched


def test_operands_are_loaded_once_a_tile(emulated):
    m, n, k, r = 256, 512, 128, 32
    product = Product((m, n, k, r), bias=False)
    found = product.run(emulated, tile_n=256)
    assert found["bytes_loaded"] == 2 * (k + r) * (2 * m + 2 * n)  # two tiles down, two across


def test_far_apart_rows(emulated):
    """Offsets past 2^31 elements of x and of y."""
    layer = Layer((10, 24, 72, 8))
    stride = (1 << 28) + 8

    def far(t: torch.Tensor) -> torch.Tensor:
        storage = torch.from_numpy(np.zeros(stride * 9 + t.shape[1], np.uint16)).view(layer.dtype)
        return storage.as_strided(t.shape, (stride, 1)).copy_(t)

    layer.x, y = far(layer.x), far(torch.zeros(10, 24, dtype=layer.dtype))
    h = torch.empty(10, 8, dtype=layer.dtype)
    emulated.forward(*layer.operands(), [bits(y)], [bits(h)], layer.options(**SM80))
    layer.check(y, h)


# ---- the plan -----------------------------------------------------------------------------------


def broadcast(rows: int, columns: int) -> np.ndarray:
    """A matrix of any size in two bytes of memory, for plans alone."""
    return np.broadcast_to(np.zeros(1, np.uint16), (rows, columns))


def plan_of(emulated, m, n, k, r, **options) -> dict:
    sizes = ((m, k), (n, k), (r, k), (n, r))
    operands = [broadcast(*size) for size in sizes]
    return emulated.forward_plan(*operands, None, broadcast(m, n), broadcast(m, r), options)


@pytest.mark.parametrize("device", [{"compute": 80}, {"compute": 120}, {"sm90a": False}])
def test_devices_that_take_it(emulated, device):
    plan = plan_of(emulated, 4096, 4096, 4096, 16, multiprocessors=108, **device)
    assert plan["served"] and "fused_gemm_sm80" in plan["text"] and "sm90 " not in plan["text"]


def test_hopper_takes_it_past_what_tma_addresses(emulated):
    plan = plan_of(emulated, 4096, 4096, 1 << 31, 16, multiprocessors=132)
    assert plan["served"] and "fused_gemm_sm80" in plan["text"]
    assert "past 2^31, which TMA cannot address" in plan["text"]


@pytest.mark.parametrize(
    "options, size, reason",
    [
        ({"compute": 75}, (256, 256, 64, 8), "older than compute capability 8.0"),
        ({"compute": 80}, (1 << 24, 1 << 24, 64, 8), "more than 2^31 tiles"),
        ({"compute": 80}, (64, 64, 1 << 36, 8), "past 2^36"),
    ],
)
def test_what_no_kernel_serves(emulated, options, size, reason):
    plan = plan_of(emulated, *size, **options)
    assert not plan["served"] and reason in plan["reason"]


def test_a_mask_of_too_many_columns_is_refused(emulated):
    n = 1 << 32
    operands = [broadcast(*size) for size in ((8, 8), (n, 8), (8, 8), (n, 8))]
    with pytest.raises(ValueError, match="mask has more than"):
        emulated.fused_gemm(*operands, None, broadcast(8, n), {"compute": 80, "seed": [1, 2]})


def test_one_launch_is_hopper_s(emulated):
    plan = plan_of(emulated, 4096, 4096, 4096, 16, compute=80, form="one_launch")
    assert not plan["served"] and "only the sm_90a kernel" in plan["reason"]


def test_tiles_fit_the_size(emulated):
    """Wide tiles where there are many, narrow ones where they alone fill the device."""
    tiles = [
        plan_of(emulated, m, n, 4096, 16, compute=80, multiprocessors=108)["tile_n"]
        for m, n in ((8192, 8192), (1024, 1024), (128, 4096))
    ]
    assert tiles == sorted(tiles, reverse=True) and tiles[0] == 256 and tiles[-1] == 64


# ---- on a device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), (4096, 1536, 2048, 16), (3000, 1000, 1000, 96)]
)
def test_on_the_gpu(shape, seed):
    layer = Layer(shape, seed=seed)
    layer.check(*on_device(layer, "sm80"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile_n", TILES[1:])
@pytest.mark.parametrize("mn_major", [False, True], ids=["k_major", "mn_major"])
def test_every_tile_on_the_gpu(mn_major, tile_n, dtype):
    layer = Layer((2500, 1800, 1096, 24), dtype)
    if mn_major:
        layer.weight = VIEWS["transposed"](layer.weight)
    layer.check(*on_device(layer, "sm80", tile_n=tile_n))


@pytest.mark.gpu
@pytest.mark.parametrize("operand", ["x", "weight", "a", "b"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_on_the_gpu(view, operand):
    layer = Layer((700, 136, 136, 24))
    setattr(layer, operand, view(getattr(layer, operand)))
    layer.check(*on_device(layer, "sm80"))

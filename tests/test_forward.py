"""fused_gemm and the whole forward pass on Hopper, in the emulator and on a device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from devices import moved
from emulator.suite import SCHEDULES
from test_kernels import close

from lora_kernels import dropout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("one_launch", "two_launches")
THRESHOLD, SCALE = 3000, 1.5
# (M, N, K, r): each is there for a reason
SHAPES = {
    "one_element": (1, 1, 1, 1),
    "one_tile": (256, 128, 64, 16),
    "all_tails": (300, 328, 200, 24),
    "second_block_without_rows": (100, 136, 72, 8),
    "ring_wraps_unevenly": (256, 200, 520, 16),
    "odd_everything": (259, 131, 67, 7),
    "rank_64": (130, 200, 136, 64),
    "rank_past_a_stage": (140, 136, 72, 72),
    "rank_128": (260, 200, 136, 128),
    "rank_past_one_launch": (130, 136, 72, 200),
    "no_rank": (300, 328, 200, 0),
    "no_rank_and_packed": (131, 136, 67, 0),
    "packed_rows_past_a_block": (20, 24, 333, 7),
    "no_rows": (0, 24, 72, 8),
    "no_columns": (20, 0, 72, 8),
    "no_depth": (20, 40, 0, 8),
    "more_tiles_than_clusters": (1030, 520, 72, 16),
}
SEEDS = {"p0": None, "dropped": [77, 5], "sharded": [77, 5, 32, 48], "unaligned": [7, 5, 3, 21]}


def bits(t: torch.Tensor | None) -> np.ndarray | None:
    """The same memory, strides included, as uint16."""
    return None if t is None else t.view(torch.uint16).numpy()


class Layer:
    """Operands of one call, in the emulator and in float64."""

    def __init__(self, shape, dtype=torch.bfloat16, bias=True, seed=None):
        m, n, k, r = shape
        g = torch.Generator().manual_seed(m + 3 * n + 7 * k + r)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=g) * scale).to(dtype)

        self.shape, self.dtype, self.seed = shape, dtype, seed
        self.x, self.weight = normal(m, k), normal(n, k, scale=max(k, 1) ** -0.5)
        self.a, self.b = normal(r, k, scale=max(k, 1) ** -0.5), normal(n, r)
        self.bias = normal(n) if bias else None

    def options(self, **options) -> dict:
        found = {"bf16": self.dtype == torch.bfloat16, "scale": (SCALE, 1.0)}
        if self.seed:
            found |= {"seed": self.seed, "threshold": THRESHOLD}
        return found | options

    def operands(self) -> tuple:
        return tuple(map(bits, (self.x, self.weight, self.a, self.b, self.bias)))

    def results(self, copies: int = 1) -> tuple[list, list]:
        m, n, _, r = self.shape
        return tuple(
            [torch.empty(m, width, dtype=self.dtype) for _ in range(copies)] for width in (n, r)
        )

    def run(self, emulated, copies: int = 1, **options):
        """(y of each copy, h of each, what the emulator and the plan say)."""
        y, h = self.results(copies)
        given = [list(map(bits, many)) for many in (y, h)]
        found = emulated.forward(*self.operands(), *given, self.options(**options))
        return y, h, found

    def plan(self, emulated, **options) -> dict:
        (y,), (h,) = self.results()
        return emulated.forward_plan(*self.operands(), bits(y), bits(h), self.options(**options))

    def check(self, y, h, up_scale: float = 1.0) -> None:
        """C1 against float64 where y is: h from x, and y from the h that was rounded."""
        _, _, k, r = self.shape
        x, a, w, b = (t.to(y.device).double() for t in (self.x, self.a, self.weight, self.b))
        xd = x
        if self.seed:
            seed = torch.tensor(self.seed, device=y.device)
            xd = torch.where(dropout.reference_mask(seed, *x.shape, THRESHOLD), x, 0)
        close(h, SCALE * xd @ a.T, SCALE * xd.abs() @ a.abs().T, k + 4)
        b, hd = up_scale * b, h.double()
        exact, total = x @ w.T + hd @ b.T, x.abs() @ w.abs().T + hd.abs() @ b.abs().T
        if self.bias is not None:
            bias = self.bias.to(y.device).double()
            exact, total = exact + bias, total + bias.abs()
        close(y, exact, total, k + r + 5)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(emulated, shape, form, seed):
    layer = Layer(shape, seed=seed)
    if form == "one_launch" and not 1 <= shape[3] <= 128:
        with pytest.raises(ValueError, match=r"r is more than 128|no LoRA term"):
            layer.run(emulated, form=form)
        return
    if 0 in shape[:2]:
        form = "two_launches"
    (y,), (h,), found = layer.run(emulated, form=form)
    layer.check(y, h)
    assert found["bank_conflicts"] == 0
    assert ("forward_sm90" in found["kernels"]) == (form == "one_launch")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile_n", [128, 192, 256])
def test_every_tile(emulated, tile_n, dtype, form):
    """In each an edge of columns, more than one group of rows, and a bias or none."""
    for seed, bias in ((None, True), ([1, 2], False)):
        layer = Layer((700, 2 * tile_n - 56, 136, 24), dtype, bias, seed)
        (y,), (h,), found = layer.run(emulated, form=form, tile_n=tile_n, group=2)
        layer.check(y, h)
        assert found["tile_n"] == tile_n and found["form"] == form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [16, 100])
def test_any_timing_gives_the_same_bits(emulated, rank, form):
    layer = Layer((520, 264, 136, rank), seed=[1, 2])
    (first,), (h,), _ = layer.run(emulated, form=form, timing="early")
    layer.check(first, h)
    for timing, schedule in [*SCHEDULES, ("random", 4), ("random", 5)]:
        (y,), _, _ = layer.run(emulated, form=form, timing=timing, schedule=schedule)
        assert torch.equal(y, first)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [8, 64, 100, 128])
@pytest.mark.parametrize("k", [64, 128, 136, 448])
def test_h_has_the_same_bits_in_both_forms(emulated, k, rank, dtype, seed):
    """One order of sums, for 1, 2, 3 and 7 stages of the depth: even ones and odd ones apart."""
    layer = Layer((150, 24, k, rank), dtype, seed=seed)
    _, (one,), found = layer.run(emulated, form="one_launch", multiprocessors=2)
    _, (two,), others = layer.run(emulated, form="two_launches", multiprocessors=2)
    assert "forward_sm90" in found["kernels"] and "down_proj_sm90" in others["kernels"]
    assert torch.equal(one.view(torch.int16), two.view(torch.int16)) and one.isfinite().all()


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
@pytest.mark.parametrize("resident", [2, 4, 6])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_progress_needs_no_residency(emulated, copies, resident, timing, schedule):
    """One cluster of each grid, or of one of them, is enough; grids do not disturb each other."""
    layer = Layer((1100, 264, 72, 16))
    ys, hs, found = layer.run(
        emulated, copies, form="one_launch", tile_n=128, group=2, chain=copies,
        multiprocessors=10, resident_blocks=resident, timing=timing, schedule=schedule,
    )  # fmt: skip
    assert found["clusters"] == 5
    for y, h in zip(ys, hs, strict=True):
        layer.check(y, h)
        assert torch.equal(y, ys[0]) and torch.equal(h, hs[0])


def test_operands_are_read_once_a_tile(emulated):
    """Each cluster loads its rows of x and the tile's columns of the weight: no byte twice."""
    m, n, k, r = 512, 512, 256, 16
    layer = Layer((m, n, k, r), bias=False)
    pairs, columns = 2, 2
    frozen = columns * m * k + pairs * n * k
    lora = columns * m * r + pairs * n * r
    _, _, two = layer.run(emulated, form="two_launches", tile_n=256)
    _, _, one = layer.run(emulated, form="one_launch", tile_n=256)
    h_alone = m * k + pairs * r * k
    assert one["bytes_loaded"] == 2 * (frozen + lora + h_alone)
    blocks = m // 64  # of down_proj, each of which reads all of A
    assert two["bytes_loaded"] == 2 * (frozen + lora + m * k + blocks * r * k)


@pytest.mark.parametrize("form", FORMS)
def test_fault_22_rows_are_isolated(emulated, form):
    """NaN and Inf stay in their row; what dropout drops still reaches the frozen product."""
    layer = Layer((300, 136, 136, 8), seed=[1, 2])
    (clean,), (h_clean,), _ = layer.run(emulated, form=form)
    mask = dropout.reference_mask(torch.tensor([1, 2]), *layer.x.shape, THRESHOLD)
    (kept, k), (dropped, d) = mask.nonzero()[500].tolist(), (~mask).nonzero()[300].tolist()
    layer.x[kept, k], layer.x[dropped, d] = torch.nan, torch.inf
    (y,), (h,), _ = layer.run(emulated, form=form)
    others = torch.arange(300) != kept
    assert h[kept].isnan().all() and torch.equal(h[others], h_clean[others])
    others &= torch.arange(300) != dropped
    assert y[kept].isnan().all() and not y[dropped].isfinite().any()
    assert torch.equal(y[others], clean[others])


VIEWS = {
    "eight_bytes_past": lambda t: torch.cat([t, t], 1)[:, 4 : t.shape[1] + 4],
    "offset_by_one": lambda t: torch.cat([t, t], 1)[:, 1 : t.shape[1] + 1],
    "padded_rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "odd_row_stride": lambda t: torch.cat([t, t], 1)[:, : t.shape[1] * 2 - 1][:, : t.shape[1]],
    "every_other_column": lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "one_row_repeated": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operand", ["x", "weight", "a", "b"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(emulated, view, operand, form):
    """What TMA cannot address is copied inside, and the plan says so."""
    layer = Layer((140, 136, 72, 24), seed=[1, 2, 3, 5])
    setattr(layer, operand, view(getattr(layer, operand)))
    if operand == "weight" and layer.plan(emulated)["mn_major"]:
        form = "two_launches"
    (y,), (h,), found = layer.run(emulated, form=form)
    layer.check(y, h)
    assert ("copied first" in found["text"]) == ("pack" in found["kernels"])


def test_strided_results_and_bias(emulated):
    """A bias of every other element, and a y that TMA cannot store."""
    layer = Layer((140, 136, 72, 24))
    layer.bias = torch.stack([layer.bias, torch.full_like(layer.bias, torch.nan)], 1)[:, 0]
    around = torch.zeros(140, 139, dtype=layer.dtype)
    y, h = around[:, 1:137], torch.empty(140, 24, dtype=layer.dtype)
    found = emulated.forward(*layer.operands(), [bits(y)], [bits(h)], layer.options())
    layer.check(y, h)
    assert not found["y_vectors"] and "bias" in found["text"]
    # The emulator poisons all memory from the first to the last element of a result.
    assert around[:, 137:].isnan().sum() == 2 * 139 and around[0, 0] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [24, 7])
@pytest.mark.parametrize("up_scale", [4.0, 0.0])
def test_scale_of_the_up_projection(emulated, up_scale, rank, form):
    """What fp16 leaves for B; none of the LoRA term where it is 0, but h is made all the same."""
    layer = Layer((140, 136, 72, rank), torch.float16)
    form = form if up_scale else "two_launches"
    (y,), (h,), _ = layer.run(emulated, form=form, scale=(SCALE, up_scale))
    layer.check(y, h, up_scale)


# shape, tile_n: more than one tile of each width; what has to be copied first, h among it
ALONE = [((300, 264, 200, 24), 0), ((131, 131, 67, 7), 0)]
ALONE += [((140, 264, 72, 16), n) for n in (128, 192, 256)]


@pytest.mark.parametrize("mn_major", [False, True], ids=["k_major", "mn_major"])
@pytest.mark.parametrize("scale", [1.0, 4.0, 2.0**-12, -1.5, 0.0])
@pytest.mark.parametrize("shape, tile_n", ALONE)
def test_fused_gemm_alone(emulated, shape, tile_n, scale, mn_major):
    """As backward calls it: W and A transposed, h given; a scale costs no copy and no accuracy."""
    m, _, k, r = shape
    layer = Layer(shape, torch.float16)
    h = torch.randn(m, r, generator=torch.Generator().manual_seed(1)).half()
    if scale == 0.0:
        h[7, 3] = torch.inf  # has no part in y
    if mn_major:
        layer.weight, layer.b = (VIEWS["transposed"](t) for t in (layer.weight, layer.b))
    (y,), _ = layer.results()
    found = emulated.fused_gemm(
        bits(layer.x), bits(layer.weight), bits(h), bits(layer.b), bits(layer.bias), bits(y),
        layer.options(scale=(0.0, scale), tile_n=tile_n),
    )  # fmt: skip
    exact = layer.x.double() @ layer.weight.double().T + layer.bias.double()
    h = h.nan_to_num(posinf=0)
    exact += scale * h.double() @ layer.b.double().T
    total = layer.x.double().abs() @ layer.weight.double().abs().T + layer.bias.double().abs()
    total += abs(scale) * h.double().abs() @ layer.b.double().abs().T
    close(y, exact, total, k + r + 5)
    odd = k % 8 != 0
    assert found["mn_major"] == mn_major and ("pack" in found["kernels"]) == odd


def test_fault_20_far_apart_rows(emulated):
    """Offsets past 2^31 elements of x, as TMA and as copies read it, and of y, in both ways too."""
    layer = Layer((10, 24, 72, 8))

    def far(t: torch.Tensor, stride: int) -> torch.Tensor:
        storage = torch.from_numpy(np.zeros(stride * 9 + t.shape[1], np.uint16)).view(layer.dtype)
        moved = storage.as_strided(t.shape, (stride, 1))
        return moved.copy_(t)

    near = layer.x
    for stride, form in itertools.product(((1 << 28) + 8, (1 << 28) + 7), FORMS):
        layer.x = far(near, stride)
        (y,), (h,), _ = layer.run(emulated, form=form)
        layer.check(y, h)
        y = far(torch.zeros_like(y), stride)
        given = (layer.operands(), [bits(y)], [bits(h)])
        emulated.forward(*given[0], *given[1:], layer.options(form=form))
        layer.check(y, h)


# ---- on a device --------------------------------------------------------------------------------


def on_device(layer: Layer, form: str, **pinned) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) of two runs, which give the same bits."""
    x, w, a, b, bias = (
        None if t is None else moved(t, "cuda")
        for t in (layer.x, layer.weight, layer.a, layer.b, layer.bias)
    )
    seed = None if layer.seed is None else torch.tensor(layer.seed, device="cuda")
    keep = 1 if seed is None else (dropout.RANGE - THRESHOLD) / dropout.RANGE
    calls = [
        torch.ops.lora_kernels.forward_as(
            x, w, a, b, bias, seed, THRESHOLD, SCALE * keep, 1.0, form,
            pinned.get("tile_n", 0), pinned.get("group", 0),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(calls[0][0], calls[1][0]) and torch.equal(calls[0][1], calls[1][1])
    return calls[0]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), (4096, 1536, 2048, 16), (3000, 1000, 1000, 96)]
)
def test_on_the_gpu(hopper, shape, form, seed):
    if form == "one_launch" and not (1 <= shape[3] <= 128 and shape[0] and shape[1]):
        pytest.skip("two launches serve it")
    layer = Layer(shape, seed=seed)
    layer.check(*on_device(layer, form))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile_n", [128, 192, 256])
@pytest.mark.parametrize("mn_major", [False, True], ids=["k_major", "mn_major"])
def test_every_tile_on_the_gpu(hopper, mn_major, tile_n, dtype, form):
    layer = Layer((2500, 1800, 1096, 24), dtype)
    if mn_major:
        layer.weight, form = VIEWS["transposed"](layer.weight), "two_launches"
    layer.check(*on_device(layer, form, tile_n=tile_n))


@pytest.mark.gpu
@pytest.mark.parametrize("operand", ["x", "weight", "a", "b"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_on_the_gpu(hopper, view, operand):
    layer = Layer((700, 136, 136, 24))
    setattr(layer, operand, view(getattr(layer, operand)))
    layer.check(*on_device(layer, ""))


@pytest.mark.gpu
def test_many_repeats_while_others_hold_the_device(hopper):
    """The grid shares the device with another stream's kernels, and gives the same bits."""
    layer = Layer((8192, 1024, 1024, 16), seed=[3, 4])
    first, h = on_device(layer, "one_launch")
    layer.check(first, h)
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(other):
            torch.mm(busy, busy)
        y, _ = on_device(layer, "one_launch")
        assert torch.equal(y, first)

"""The decode kernel, one launch for up to 64 rows, in the emulator and on a GPU."""

from __future__ import annotations

import decode_problems
import numpy as np
import pytest
import torch
from emulator import suite
from test_forward import DTYPES, SEEDS, VIEWS, Layer, bits, on_device

from lora_kernels import dropout

ROWS = [1, 2, 7, 8, 15, 16, 17, 33, 64]


@pytest.mark.parametrize("name", decode_problems.DECODE)
def test_exact_problems(emulated, name):
    """y and h to the bit under every timing, no bank conflict, and W loaded once."""
    case = decode_problems.DECODE[name]
    suite.check_decode(emulated, decode_problems.decode_problem(*case))


def padded(layer: Layer) -> Layer:
    """W and A in rows on 16-byte boundaries, whatever K is."""
    for name in ("weight", "a"):
        matrix = getattr(layer, name)
        wide = torch.full((matrix.shape[0], matrix.shape[1] // 8 * 8 + 16), torch.nan)
        wide = wide.to(layer.dtype)
        wide[:, : matrix.shape[1]] = matrix
        setattr(layer, name, wide[:, : matrix.shape[1]])
    return layer


def run(emulated, layer: Layer, **options):
    """(y, h, what the emulator and the plan say), where the traffic is what the plan says."""
    (y,), (h,), found = layer.run(emulated, form="decode", **options)
    assert found["kernels"] == ["decode"] and found["bank_conflicts"] == 0
    assert found["bytes_loaded"] == found["decode"]["loaded_bytes"]
    return y, h, found


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("m", ROWS)
def test_rows_and_parts(emulated, m, splits):
    """Random data of every number of rows and parts, in a rank and a depth of its own."""
    r = (1, 8, 16, 17, 24, 0, 64, 7, 48)[ROWS.index(m)]
    seed = list(SEEDS.values())[(m + splits) % 4]
    dtype = list(DTYPES.values())[m % 2]
    layer = padded(Layer((m, 75 + m, 60 + 41 * splits, r), dtype, m % 3 > 0, seed))
    layer.check(*run(emulated, layer, splits=splits)[:2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m, rows, splits", [(5, 64, 2), (5, 192, 8), (64, 64, 4), (40, 192, 1)])
def test_every_tile(emulated, m, rows, splits, dtype):
    """More than one tile of each kind, the last one narrower, and a mask."""
    layer = Layer((m, 2 * rows, 264, 24), dtype, seed=[1, 2])
    y, h, found = run(emulated, layer, rows=rows, splits=splits)
    layer.check(y, h)
    assert found["decode"]["rows"] == rows and found["tiles"] >= 2


@pytest.mark.parametrize("m, splits", [(16, 1), (16, 8), (64, 2)])
def test_any_timing_gives_the_same_bits(emulated, m, splits):
    layer = Layer((m, 200, 520, 24), seed=[1, 2])
    first, h, _ = run(emulated, layer, splits=splits, timing="early")
    for timing, schedule in [*suite.SCHEDULES, ("random", 4), ("random", 5)]:
        found = run(
            emulated, layer, splits=splits, timing=timing, schedule=schedule, resident_blocks=8
        )
        assert torch.equal(found[0], first) and torch.equal(found[1], h)


@pytest.mark.parametrize("m", [9, 40])
def test_h_does_not_depend_on_the_tile(emulated, m):
    """Its sums have one order for each number of parts."""
    layer = Layer((m, 72, 264, 24), seed=[1, 2])
    for splits in (1, 4):
        tiles = [dict(rows=64, decode_n=32), dict(rows=192, decode_n=80)]
        h, *others = (run(emulated, layer, splits=splits, **tile)[1] for tile in tiles)
        assert all(torch.equal(other, h) for other in others)


@pytest.mark.parametrize("m, splits", [(9, 1), (40, 4)])
def test_fault_22_rows_are_isolated(emulated, m, splits):
    """NaN and Inf stay in their row; what dropout drops still reaches the frozen product, not h."""
    layer = Layer((m, 72, 136, 24), seed=[1, 2])
    clean, h_clean, _ = run(emulated, layer, splits=splits)
    mask = dropout.reference_mask(torch.tensor([1, 2]), *layer.x.shape, 3000)
    (kept, k), (dropped, d) = mask[:4].nonzero()[3].tolist(), (~mask[5:]).nonzero()[9].tolist()
    dropped += 5
    layer.x[kept, k], layer.x[dropped, d] = torch.nan, torch.inf
    y, h, _ = run(emulated, layer, splits=splits)
    others = torch.arange(m) != kept
    assert h[kept].isnan().all() and torch.equal(h[others], h_clean[others])
    others &= torch.arange(m) != dropped
    assert y[kept].isnan().all() and not y[dropped].isfinite().any()
    assert torch.equal(y[others], clean[others])


def test_missing_ranks_carry_no_infinity(emulated):
    """Where x holds an Inf, ranks past r, zero times Inf, have no part in y."""
    layer = Layer((3, 40, 72, 1))
    layer.x[1, 5] = torch.inf
    layer.b.fill_(0.5)
    layer.weight.abs_()
    layer.a.abs_()
    y, h, _ = run(emulated, layer)
    assert (y[1] == torch.inf).all() and (h[1] == torch.inf).all()


@pytest.mark.parametrize("operand", ["x", "b"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_of_x_and_b(emulated, view, operand):
    layer = Layer((20, 72, 136, 24), seed=[1, 2, 3, 5])
    setattr(layer, operand, view(getattr(layer, operand)))
    layer.check(*run(emulated, layer, splits=2)[:2])


@pytest.mark.parametrize("operand, name", [("weight", "the weight"), ("a", "A")])
@pytest.mark.parametrize("view", VIEWS, ids=VIEWS)
def test_the_weight_and_a_need_vectors(emulated, view, operand, name):
    """Else the plan says so, and two launches serve the call."""
    layer = Layer((20, 72, 136, 24))
    setattr(layer, operand, VIEWS[view](getattr(layer, operand)))
    if view in ("padded_rows", "odd_row_stride", "one_row_repeated"):
        layer.check(*run(emulated, layer)[:2])
        return
    with pytest.raises(ValueError, match=f"contiguous rows of {name} on 16-byte boundaries"):
        run(emulated, layer)
    assert layer.plan(emulated)["form"] != "decode"


def test_strided_results_and_bias(emulated):
    layer = Layer((33, 72, 136, 24))
    layer.bias = torch.stack([layer.bias, torch.full_like(layer.bias, torch.nan)], 1)[:, 0]
    around = torch.zeros(33, 75, dtype=layer.dtype)
    y, h = around[:, 1:73], torch.empty(24, 33, dtype=layer.dtype).t()
    emulated.forward(*layer.operands(), [bits(y)], [bits(h)], layer.options(form="decode"))
    layer.check(y, h)
    assert around[:, 73:].isnan().sum() == 2 * 32 and around[0, 0] == 0


@pytest.mark.parametrize("up_scale", [4.0, 2.0**-12, 0.0])
def test_scale_of_the_up_projection(emulated, up_scale):
    """What fp16 leaves for B; none of the LoRA term where it is 0, but h is made all the same."""
    layer = Layer((20, 72, 136, 24), torch.float16)
    layer.check(*run(emulated, layer, scale=(1.5, up_scale))[:2], up_scale)
    if up_scale == 0:
        layer.b[7, 3] = torch.inf
        y, _, _ = run(emulated, layer, scale=(1.5, up_scale))
        assert y.isfinite().all()


def test_nothing_to_do(emulated):
    """No rows, or neither columns nor ranks: no launch at all."""
    for shape in ((0, 24, 72, 8), (5, 0, 72, 0)):
        _, _, found = Layer(shape).run(emulated, form="decode")
        assert found["kernels"] == []


def test_far_apart_rows(emulated):
    """Offsets past 2^31 elements, of x and of y."""
    layer = Layer((10, 24, 72, 8))
    (y,), (h,) = layer.results()

    def far(t: torch.Tensor, stride: int) -> torch.Tensor:
        storage = torch.from_numpy(np.zeros(stride * 9 + t.shape[1], np.uint16)).view(layer.dtype)
        return storage.as_strided(t.shape, (stride, 1)).copy_(t)

    near = layer.x
    for stride in ((1 << 28) + 8, (1 << 28) + 7):
        layer.x, y = far(near, stride), far(torch.zeros_like(y), stride)
        emulated.forward(*layer.operands(), [bits(y)], [bits(h)], layer.options(form="decode"))
        layer.check(y, h)


# ---- on a device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("n, k, r", [(4096, 4096, 16), (1000, 1096, 100), (14336, 4096, 0)])
@pytest.mark.parametrize("m", ROWS)
def test_on_the_gpu(m, n, k, r, seed):
    layer = Layer((m, n, k, r), list(DTYPES.values())[m % 2], seed=seed)
    layer.check(*on_device(layer, "decode"))


@pytest.mark.gpu
@pytest.mark.parametrize("operand", ["x", "b"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides_on_the_gpu(view, operand):
    layer = Layer((20, 136, 136, 24), seed=[1, 2, 3, 5])
    setattr(layer, operand, view(getattr(layer, operand)))
    layer.check(*on_device(layer, "decode"))

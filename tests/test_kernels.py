"""The three kernels by name, each against its definition in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from tolerance import UNIT
from triton_interpreter import INTERPRETED

from lora_kernels import composed, dropout

OPS = torch.ops.lora_kernels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [
    (1, 1, 1),
    (7, 5, 3),
    (48, 256, 16),
    (49, 257, 17),
    (200, 130, 65),
    (95, 600, 130),
    (13, 40, 300),
]
NEEDS_TRITON = pytest.mark.skipif(
    not INTERPRETED, reason="on CPU tensors Triton runs in its interpreter alone"
)
SEED = torch.tensor([77, 5, 3, 21])  # an origin that no 16x16 block starts at
THRESHOLD = 3000


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def dropped(x, seed):
    if seed is None:
        return x.double()
    mask = dropout.reference_mask(seed, *x.shape, THRESHOLD)
    return torch.where(mask, x.double() * dropout.RANGE / (dropout.RANGE - THRESHOLD), 0)


def close(got, exact, total, length, eager=0.0):
    """C1 without an intermediate: one rounding, fp32 accumulation, `eager` more roundings."""
    u = UNIT[got.dtype]
    bound = (
        1.05 * u * exact.abs()
        + length * 2.0**-23 * total
        + eager * total
        + 2.0**-24 * (got.dtype == torch.float16)
        + 2.0**-133
    )
    assert ((got.double() - exact).abs() <= bound).all()


class Triton:
    """Its three launchers, imported when they are called."""

    def __getattr__(self, name):
        return getattr(importlib.import_module(f"lora_kernels.triton_kernels.{name}"), name)


def variants():
    return [
        pytest.param(OPS, 0.0, id="cpp"),
        pytest.param(composed, 1.0, id="composed"),
        pytest.param(Triton(), 0.0, id="triton", marks=NEEDS_TRITON),
    ]


@pytest.mark.parametrize("kernels, eager", variants())
@pytest.mark.parametrize("seed", [None, SEED], ids=["p0", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m, k, r", SHAPES)
def test_down_proj(kernels, eager, m, k, r, dtype, seed):
    x, down = normal(m, k, dtype=dtype), normal(r, k, dtype=dtype, seed=1)
    h = kernels.down_proj(x, down, seed, THRESHOLD, -1.5)
    xd = dropped(x, seed)
    assert h.dtype == dtype and h.shape == (m, r)
    close(h, -1.5 * xd @ down.double().T, 1.5 * xd.abs() @ down.double().abs().T, k + 4)


@pytest.mark.parametrize("kernels, eager", variants())
@pytest.mark.parametrize("seed", [None, SEED], ids=["p0", "dropped"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m, k, r", SHAPES)
def test_fused_gemm(kernels, eager, m, k, r, bias, dtype, seed):
    n = 90
    x, w = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1)
    h, up = normal(m, r, dtype=dtype, seed=2), normal(n, r, dtype=dtype, seed=3)
    b = normal(n, dtype=dtype, seed=4) if bias else None
    y = kernels.fused_gemm(x, w, h, up, b, seed, THRESHOLD, 0.75)
    term = 0.75 * h.double() @ up.double().T
    size = 0.75 * h.double().abs() @ up.double().abs().T
    if seed is not None:
        mask = dropout.reference_mask(seed, m, n, THRESHOLD)
        inverse = dropout.RANGE / (dropout.RANGE - THRESHOLD)
        term, size = torch.where(mask, term * inverse, 0), size * inverse
    base, base_size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias:
        base, base_size = base + b.double(), base_size + b.double().abs()
    assert y.dtype == dtype and y.shape == (m, n)
    close(y, base + term, base_size + size, k + r + 4, eager * 2 * UNIT[dtype])


def test_panels_of_a_16bit_operand():
    """So deep that y is made in two panels of rows by two of columns, each with its own mask."""
    m, n, k, r = 130, 70, 33000, 3
    x, w, h, up = (
        normal(*size, dtype=torch.bfloat16, seed=i)
        for i, size in enumerate(((m, k), (n, k), (m, r), (n, r)))
    )
    h *= 64  # the term is as large as the product
    y = OPS.fused_gemm(x, w, h, up, None, SEED, THRESHOLD, 1.0)
    keep = dropped(torch.ones(m, n), SEED)
    product, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    close(y, product + keep * (h.double() @ up.double().T), size, k + r)


@pytest.mark.parametrize("kernels, eager", variants())
@pytest.mark.parametrize("seed", [None, SEED], ids=["p0", "dropped"])
@pytest.mark.parametrize("transpose", [False, True], ids=["rK", "Kr"])
@pytest.mark.parametrize("wide", [False, True], ids=["same", "wide"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m, k, r", SHAPES)
def test_weight_grad(kernels, eager, m, k, r, wide, transpose, dtype, seed):
    h, x = normal(m, r, dtype=dtype), normal(m, k, dtype=dtype, seed=1)
    grad = kernels.weight_grad(h, x, seed, THRESHOLD, 2.5, wide, transpose)
    xd = dropped(x, seed)
    exact, total = 2.5 * h.double().T @ xd, 2.5 * h.double().abs().T @ xd.abs()
    if transpose:
        exact, total = exact.T, total.T
    assert grad.dtype == (torch.float32 if wide else dtype) and grad.is_contiguous()
    close(grad, exact, total, m + 4, eager * UNIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_conversions_are_exact(dtype):
    """Every 16-bit pattern survives the way through fp32, and fp32 rounds to nearest even."""
    if dtype != torch.float32:
        patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
        one = torch.ones(1, 1, dtype=dtype)
        back = OPS.weight_grad(one, patterns[None], None, 0, 1.0, True, False)[0]
        expected = patterns.float()
        assert ((back == expected) | (back.isnan() & expected.isnan())).all()
    exponents = torch.randint(-30, 20, (200_000,), generator=torch.Generator().manual_seed(1))
    values = normal(200_000) * 2.0**exponents
    special = torch.tensor(
        [65519.0, 65520.0, 65536.0, 1e30, torch.inf, torch.nan, 2.0**-24, 2.0**-25]
    )
    values = torch.cat([values, special, -special, 3 * special])
    h = values.to(dtype)
    # down_proj with K = 1 and down = 1 is the conversion h = round(x)
    got = OPS.down_proj(values[:, None], torch.ones(1, 1), None, 0, 1.0)[:, 0]
    assert ((got == values) | values.isnan()).all()
    rounded = OPS.fused_gemm(
        h[:, None][:, :0],
        h[:1, None][:, :0],
        h[:, None],
        torch.ones(1, 1, dtype=dtype),
        None,
        None,
        0,
        1.0,
    )[:, 0]
    assert ((rounded == h) | h.isnan()).all()
    # weight_grad of one row is an outer product, exact in fp32 and then rounded: ties too
    left, right = h[:400], h[-400:]
    got = OPS.weight_grad(left[None], right[None], None, 0, 1.0, False, False)
    expected = (left.float()[:, None] * right.float()).to(dtype)
    assert ((got == expected) | (got.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fault_25_flush_to_zero_mode_keeps_16bit_subnormals(dtype):
    torch.set_flush_denormal(True)
    try:
        x = torch.tensor([[2.0**-20]]).to(dtype)
        assert OPS.down_proj(x, torch.ones(1, 1, dtype=dtype), None, 0, 1.0).item() == 2.0**-20
    finally:
        torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def isa_module(compiled):
    """The CPU kernels at every vector width."""
    return compiled("isa_module")


@pytest.mark.parametrize("seed", [[], [5, 6, 7, 40]], ids=["p0", "dropped"])
@pytest.mark.parametrize("isa", ["lanes4", "lanes8", "lanes16"])
@pytest.mark.parametrize("m, k, r", SHAPES)
def test_every_vector_width(isa_module, isa, m, k, r, seed):
    """4, 8 and 16 lanes, cut where two threads would cut: all are held to the same bound."""
    x, down, h = normal(m, k), normal(r, k, seed=1), normal(m, r, seed=2)
    up, product = normal(k, r, seed=3), normal(m, k, seed=4)
    mask = torch.ones(m, k, dtype=torch.bool)
    if seed:
        mask = dropout.reference_mask(torch.tensor(seed), m, k, THRESHOLD)
    xd = torch.where(mask, x.double(), 0)
    rows, cols = min(48, m), min(64, k)
    args = (seed, THRESHOLD)
    got = isa_module.down_proj(isa, x.numpy(), down.numpy(), *args, rows)
    close(torch.from_numpy(got), xd @ down.double().T, xd.abs() @ down.double().abs().T, k)
    got = isa_module.weight_grad(isa, h.numpy(), x.numpy(), *args, cols)
    close(torch.from_numpy(got), h.double().T @ xd, h.double().abs().T @ xd.abs(), m)
    got = isa_module.fused_gemm(isa, product.numpy(), h.numpy(), up.numpy(), *args, cols)
    term = torch.where(mask, h.double() @ up.double().T, 0)
    size = product.double().abs() + h.double().abs() @ up.double().abs().T
    close(torch.from_numpy(got), product.double() + term, size, r + 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: OPS.down_proj(x, x[:, :3], None, 0, 1.0), r"down_proj: down.size\(1\) is 3"),
        (lambda x: OPS.down_proj(x.int(), x, None, 0, 1.0), "x must be float32"),
        (lambda x: OPS.down_proj(x, x, torch.zeros(3, dtype=torch.int64), 0, 1.0), "seed must be"),
        (lambda x: OPS.down_proj(x, x, torch.zeros(2), 0, 1.0), "seed must be"),
        (lambda x: OPS.down_proj(x, x, torch.tensor([1, 2]), -1, 1.0), "threshold must be"),
        (lambda x: OPS.fused_gemm(x, x, x[:2], x, None, None, 0, 1.0), r"h.size\(0\)"),
        (lambda x: OPS.fused_gemm(x, x, x, x[:, :2], None, None, 0, 1.0), r"up.size\(1\)"),
        (
            lambda x: OPS.fused_gemm(x, x, x, x, x[0, :2], None, 0, 1.0),
            r"bias.size\(0\) is 2 but must be 4",
        ),
        (
            lambda x: OPS.fused_gemm(x, x.half(), x, x, None, None, 0, 1.0),
            "weight has dtype float16 but must have that of x, float32",
        ),
        (lambda x: OPS.weight_grad(x[:2], x, None, 0, 1.0, False, False), r"h.size\(0\)"),
        (lambda x: OPS.weight_grad(x[0], x, None, 0, 1.0, False, False), "two dimensions"),
        (lambda x: OPS.dropout_mask(torch.tensor([1, 2]), -1, 4, 0), "must not be negative"),
    ],
)
def test_direct_calls_with_bad_arguments_raise(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(4, 4))

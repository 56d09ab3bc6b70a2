"""Bad input: each fault has its message, and none crashes or computes something else."""

from __future__ import annotations

import re

import pytest
import torch

import lora_kernels as lk

SPEC = dict(x=(5, 8), weight=(6, 8), lora_a=(3, 8), lora_b=(6, 3), bias=(6,))


def call(**changes):
    """A good call with some arguments replaced; a tuple stands for a tensor of that shape."""
    args = {**SPEC, **changes}
    tensors = {k: torch.randn(*v) if isinstance(v, tuple) else v for k, v in args.items()}
    names = ("x", "weight", "lora_a", "lora_b", "bias")
    return lk.fused_lora_linear(
        *(tensors[n] for n in names), **{k: v for k, v in tensors.items() if k not in names}
    )


BAD_SHAPES = {
    "01_x_width": (dict(x=(5, 7)), r"x.size\(-1\) = 7 must equal weight.size\(1\) = 8"),
    "01_weight_transposed": (dict(x=(5, 6)), "it looks transposed: pass weight.t"),
    "02_a_width": (dict(lora_a=(3, 9)), r"lora_a must be \[r, in_features=8\], but got \[3, 9\]"),
    "02_a_transposed": (dict(lora_a=(8, 3)), r"transposed: pass lora_a.t\(\)"),
    "02_a_1d": (dict(lora_a=(24,)), r"lora_a must be \[r, in_features=8\], but got \[24\]"),
    "02_b_rank": (dict(lora_b=(6, 4)), r"lora_b must be \[out_features=6, r=3\], but got \[6, 4\]"),
    "02_b_transposed": (dict(lora_b=(3, 6)), r"transposed: pass lora_b.t\(\)"),
    "03_weight_flat": (dict(weight=(48,)), r"shape \[48\]: the parameter looks sharded, flattened"),
    "03_weight_empty": (dict(weight=(0,)), r"shape \[0\]: the parameter looks sharded"),
    "03_weight_3d": (dict(weight=(1, 6, 8)), "must be .out_features, in_features."),
    "09_bias_length": (dict(bias=(5,)), r"bias must be \[out_features=6\], but got \[5\]"),
    "09_bias_2d": (dict(bias=(1, 6)), r"bias must be \[out_features=6\], but got \[1, 6\]"),
    "15_x_0d": (dict(x=torch.tensor(1.0)), "x must have at least one dimension"),
}


@pytest.mark.parametrize("changes, message", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_shapes(changes, message):
    with pytest.raises(ValueError, match=f"fused_lora_linear: .*{message}"):
        call(**changes)


def test_04_dtensor_mixed_with_tensor():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        weight = DTensor.from_local(torch.randn(6, 8), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"got DTensor for weight.*pass local tensors"):
            call(weight=weight)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias", "seed"])
def test_05_devices(name):
    if name == "seed":
        other = torch.zeros(2, dtype=torch.int64, device="meta")
    else:
        other = torch.empty(SPEC[name], device="meta")
    with pytest.raises(
        ValueError, match=rf"x is on cpu but {name} is on meta; move it with {name}.to"
    ):
        call(**{name: other}, dropout_p=0.1)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
def test_06_unsupported_dtypes(name, dtype):
    with pytest.raises(
        ValueError, match=rf"dtype {dtype} is not supported for {name}; use float16"
    ):
        call(**{name: torch.zeros(SPEC[name]).to(dtype)})


def all_of(dtype):
    return {k: torch.randn(*v).to(dtype) for k, v in SPEC.items()}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_07_dtype_combinations(low):
    ok = all_of(low)
    wide = {k: torch.randn(*SPEC[k]) for k in ("lora_a", "lora_b")}
    assert call(**ok).dtype == low
    assert call(**(ok | wide)).dtype == low
    for name in ("weight", "bias"):
        with pytest.raises(
            ValueError, match=f"{name} must have x's dtype {low}, but got torch.float32"
        ):
            call(**(ok | {name: torch.randn(*SPEC[name])}))
    with pytest.raises(
        ValueError, match=f"weight must have x's dtype torch.float32, but got {low}"
    ):
        call(weight=ok["weight"])
    with pytest.raises(
        ValueError, match=r"lora_a must have x's dtype torch.float32, or float32 with"
    ):
        call(lora_a=ok["lora_a"])
    with pytest.raises(
        ValueError, match=f"lora_b must have x's dtype {low}.*but got torch.float64"
    ):
        call(**(ok | {"lora_b": wide["lora_b"].double()}))
    with torch.autocast("cpu", dtype=low):
        assert call().dtype == low
        assert call(weight=ok["weight"]).dtype == low
        with pytest.raises(ValueError, match="lora_a must have x's dtype"):
            call(lora_a=torch.randn(3, 8, dtype=torch.float64))


def test_08_weight_that_requires_grad():
    weight = torch.randn(6, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"weight requires grad.*weight.requires_grad_\(False\)"):
        call(weight=weight)
    with torch.no_grad():
        assert call(weight=weight).shape == (5, 6)


def test_09_bias_gradient_is_the_column_sum():
    bias = torch.randn(6, requires_grad=True)
    dy = torch.randn(5, 6)
    call(bias=bias).backward(dy)
    torch.testing.assert_close(bias.grad, dy.sum(0))


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_10_scaling_must_be_finite(scaling):
    message = re.escape(f"but got {scaling}")
    with pytest.raises(ValueError, match=f"scaling must be finite.*, {message}"):
        call(scaling=scaling)


def test_10_scaling_types():
    with pytest.raises(
        TypeError, match=r"scaling must be a number, but got a Tensor.*lora_b \* scaling"
    ):
        call(scaling=torch.tensor(2.0))
    with pytest.raises(TypeError, match="scaling must be a number, but got str"):
        call(scaling="2")
    assert call(scaling=2).shape == (5, 6)


def off_problem():
    """Operands whose LoRA term would be NaN everywhere if it were multiplied by zero."""
    bad = torch.full((6, 3), torch.inf).requires_grad_()
    x = torch.randn(5, 8, requires_grad=True)
    a = torch.full((3, 8), torch.nan).requires_grad_()
    return x, torch.randn(6, 8), a, bad


@pytest.mark.parametrize("off", [dict(scaling=0.0), dict(dropout_p=1.0)], ids=["10_s0", "11_p1"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "op"])
def test_a_term_that_is_off_is_exactly_zero(backend, off, compiled):
    x, w, a, b = off_problem()
    f = lk.fused_lora_linear
    if compiled:
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    y = f(x, w, a, b, backend=backend, **off)
    expected = torch.nn.functional.linear(x, w)
    dy = torch.randn(5, 6)
    torch.testing.assert_close(y, expected)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    torch.testing.assert_close(dx, dy @ w)
    assert torch.equal(da, torch.zeros_like(a)) and torch.equal(db, torch.zeros_like(b))


def test_10_negative_scaling(backend):
    args = [torch.randn(*SPEC[n]) for n in ("x", "weight", "lora_a", "lora_b")]
    plus, minus = (lk.fused_lora_linear(*args, scaling=s, backend=backend) for s in (2.0, -2.0))
    torch.testing.assert_close(plus + minus, 2 * torch.nn.functional.linear(*args[:2]))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_11_dropout_probability(p):
    with pytest.raises(
        ValueError, match=f"dropout probability has to be between 0 and 1, but got {p}"
    ):
        call(dropout_p=p)


def test_11_dropout_type():
    with pytest.raises(TypeError, match="dropout_p must be a number, but got"):
        call(dropout_p="0.1")


@pytest.mark.parametrize(
    "seed",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)],
    ids=["length", "dtype", "dims"],
)
def test_malformed_seed(seed):
    with pytest.raises(ValueError, match=r"seed must be an int64 tensor \[2\] = \(seed, offset\)"):
        call(seed=seed, dropout_p=0.1)


def test_backend_must_be_a_name():
    for bad in (3, torch.ones(2), []):
        with pytest.raises(TypeError, match="backend must be a name or None, but got"):
            call(backend=bad)


@pytest.mark.parametrize("bad", ["0.1", None, True, torch.tensor(0.1)])
def test_probabilities_must_be_numbers(bad):
    with pytest.raises(TypeError, match="keep_probability: p must be a number, but got"):
        lk.keep_probability(bad)
    with pytest.raises(TypeError, match="dropout_mask: p must be a number, but got"):
        lk.dropout_mask([1, 2], (5, 8), bad)


@pytest.mark.parametrize("bad", [3, "ab", (2.5, 1), torch.tensor(1.0), None])
def test_shape_and_seed_of_a_mask_must_be_integers(bad):
    with pytest.raises(TypeError, match="dropout_mask: shape must be a sequence of integers"):
        lk.dropout_mask([1, 2], bad, 0.5)
    if not isinstance(bad, torch.Tensor):
        with pytest.raises(TypeError, match="dropout_mask: seed must be a sequence of integers"):
            lk.dropout_mask(bad, (5, 8), 0.5)


BAD_LAYERS = {
    "r": [2.5, "4", None, -1],
    "lora_dropout": ["0.1", None, 1.5, float("nan")],
    "lora_alpha": ["16", float("nan"), float("inf"), 10**400],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD_LAYERS.items() for v in vs])
def test_arguments_of_a_layer(name, value):
    with pytest.raises(ValueError, match=f"LoRALinear: {name} must be .*, but got"):
        lk.LoRALinear(8, 6, **({"r": 4} | {name: value}))


@pytest.mark.parametrize("left", [0, 96], ids=["freed", "cut"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_a_tensor_without_its_memory_is_refused(name, left):
    """FSDP frees the storage of a parameter that it has sharded, and its sizes stay."""
    t = torch.randn(SPEC[name])
    t.untyped_storage().resize_(min(left, t.nbytes // 2))
    with pytest.raises(RuntimeError, match="its storage of"):
        call(**{name: t}, backend="cpu")


@pytest.mark.parametrize("name", list(SPEC))
def test_arguments_that_are_no_tensors(name):
    for bad in ([[1.0]], 3.0) + (() if name == "bias" else (None,)):
        with pytest.raises(
            TypeError, match=f"{name} must be a Tensor, but got {type(bad).__name__}"
        ):
            call(**{name: bad})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_row(backend, value):
    x, w, a, b = (
        torch.randn(*s, dtype=torch.float32) for s in ((40, 48), (30, 48), (8, 48), (30, 8))
    )
    clean = lk.fused_lora_linear(
        x, w, a, b, dropout_p=0.3, seed=torch.tensor([1, 2]), backend=backend
    )
    x[17, 5] = value
    y = lk.fused_lora_linear(x, w, a, b, dropout_p=0.3, seed=torch.tensor([1, 2]), backend=backend)
    others = torch.arange(40) != 17
    assert torch.equal(y[others], clean[others]) and not y[17].isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_value_under_a_dropped_element_vanishes(backend, value):
    """With W = 0 only the dropped copy of x is read; 0 * Inf would be NaN. So too for dA."""
    seed = torch.tensor([1, 2])
    mask = lk.dropout_mask(seed, (40, 48), 0.5)
    x, a, b = torch.randn(40, 48), torch.randn(8, 48), torch.randn(30, 8)
    x[~mask] = value
    x.requires_grad_()
    a.requires_grad_()
    kernels = torch.ops.lora_kernels
    h = kernels.down_proj(x.detach(), a.detach(), seed, 8192, 1.0)
    grad = kernels.weight_grad(h, x.detach(), seed, 8192, 1.0, False, False)
    assert h.isfinite().all() and grad.isfinite().all()
    weight = torch.zeros(30, 48)
    y = lk.fused_lora_linear(x, weight, a, b, dropout_p=0.5, seed=seed, backend=backend)
    da = torch.autograd.grad(y, a, torch.randn(40, 30))[0]
    assert da.isfinite().all()


def test_fp32_gradients_of_fp16_operands_do_not_overflow(backend):
    x = torch.full((4096, 64), 4.0, dtype=torch.float16)
    a, b = torch.full((2, 64), 0.01).requires_grad_(), torch.full((8, 2), 0.5)
    y = lk.fused_lora_linear(x, torch.zeros(8, 64).half(), a, b, backend=backend)
    da = torch.autograd.grad(y, a, torch.full_like(y, 4.0))[0]
    assert da.dtype == torch.float32 and (da == 4096 * 4 * 16).all()


def test_fp16_h_does_not_overflow_where_eager_does_not(backend):
    """s = 64 with x·Aᵀ near 60000 / 8: h scaled by s would be infinite, y is not."""
    x = torch.full((4, 64), 8.0, dtype=torch.float16)
    a = torch.full((2, 64), 14.0, dtype=torch.float16)
    b = torch.full((3, 2), 2.0**-7, dtype=torch.float16)
    w = torch.zeros(3, 64, dtype=torch.float16)
    y = lk.fused_lora_linear(x, w, a, b, scaling=64.0, backend=backend)
    if backend == "reference":  # the definition scales before it rounds
        return
    assert y.isfinite().all() and abs(y[0, 0].item() - 7168.0) <= 4


@pytest.mark.parametrize("p", [float("inf"), 7.0, -1.0])
def test_the_operator_alone_refuses_what_is_no_probability(p):
    tensors = [torch.randn(SPEC[n]) for n in ("x", "weight", "lora_a", "lora_b")]
    with pytest.raises(ValueError, match="lora_linear: dropout probability has to be between"):
        torch.ops.lora_kernels.lora_linear(*tensors, None, torch.tensor([1, 2]), 1.0, p, "composed")

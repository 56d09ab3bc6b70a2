"""The operators: schemas, fakes, autograd, autocast. Each schema is written here and nowhere else.

    forward    h  = down_proj(x, A)              y  = fused_gemm(x, W0, h, B) + bias
    backward   dh = down_proj(dy, Bᵀ)            dx = fused_gemm(dy, W0ᵀ, dh, Aᵀ)
               dA = weight_grad(dh, x)           dB = weight_grad(h, dy)ᵀ

`forward` and `backward` run one of these lines in C++ (csrc/torch); a device serves them as soon as
its library registers them. `lora_linear` and `lora_linear_backward` are what torch.compile, export
and FlopCounterMode see: opaque, any backend, differentiable once.

Scales: h = h_scale · dropout(x)·Aᵀ is what is rounded and saved, and y = ... + up_scale · h·Bᵀ, with
h_scale · up_scale = scaling (`split_scaling`). `threshold` is T of the mask (`lora_kernels.dropout`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backend as backends
from . import composed, dropout
from .reference import autocast_operands

SCHEMAS = (
    "dropout_mask(Tensor seed, SymInt rows, SymInt cols, int threshold) -> Tensor",
    "down_proj(Tensor x, Tensor down, Tensor? seed, int threshold, float scale) -> Tensor",
    "fused_gemm(Tensor x, Tensor weight, Tensor h, Tensor up, Tensor? bias, Tensor? seed, "
    "int threshold, float scale) -> Tensor",
    "weight_grad(Tensor h, Tensor x, Tensor? seed, int threshold, float scale, ScalarType dtype, "
    "bool transpose) -> Tensor",
    "forward(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "int threshold, float h_scale, float up_scale) -> (Tensor y, Tensor h)",
    "backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h, "
    "Tensor? seed, int threshold, float h_scale, float up_scale, ScalarType a_dtype, "
    "ScalarType b_dtype, bool need_x, bool need_a, bool need_b, bool need_bias) "
    "-> (Tensor dx, Tensor da, Tensor db, Tensor dbias)",
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "float scaling, float dropout_p, str backend) -> (Tensor y, Tensor h)",
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h, "
    "Tensor? seed, float scaling, float dropout_p, str backend, bool need_x, bool need_a, bool need_b, "
    "bool need_bias) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)",
)
LIBRARY = torch.library.Library("lora_kernels", "DEF")
for schema in SCHEMAS:
    # Any stride is served, so the compiler may choose; outputs are always contiguous.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))

try:
    from . import _C  # noqa: F401  its import registers the C++ kernels
except ImportError as error:  # not built, or built for another system: every op still has Python
    backends.EXTENSION_ERROR = str(error)

# What a device has no C++ kernel for is composed of the vendor's.
for _name, _default in (
    ("dropout_mask", dropout.reference_mask),
    ("down_proj", composed.down_proj),
    ("fused_gemm", composed.fused_gemm),
    ("weight_grad", composed.weight_grad),
):
    LIBRARY.impl(_name, _default, "CompositeExplicitAutograd")


def split_scaling(scaling: float, dtype: torch.dtype) -> tuple[float, float]:
    """(h_scale, up_scale), h_scale · up_scale = scaling.

    In fp16, where h might overflow although y does not, the smallest power of two >= |scaling| is left
    for the up projection: |h_scale| is in (1/2, 1], so h is finite wherever an unscaled one is.
    """
    if dtype != torch.float16 or scaling == 0:
        return scaling, 1.0
    mantissa, exponent = math.frexp(scaling)  # |mantissa| in [1/2, 1)
    if abs(mantissa) == 0.5:
        mantissa, exponent = 2 * mantissa, exponent - 1
    return mantissa, math.ldexp(1.0, exponent)


# ---- what `lora_linear` does, in eager mode and inside the op ------------------------------------


def switched_off(scaling: float, dropout_p: float) -> bool:
    """A LoRA term that is exactly zero: no Inf or NaN of A or B may reach y or a gradient."""
    return scaling == 0 or dropout.drop_threshold(dropout_p) == dropout.RANGE


def run_forward(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend):
    """(y, h) by `backend`, a `backend.Backend`."""
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if switched_off(scaling, dropout_p):
        lora_a, lora_b = lora_a[:0], lora_b[:, :0]
        y, _ = backend.forward(
            x, weight, lora_a.to(dtype), lora_b.to(dtype), bias, None, 0, 1.0, 1.0
        )
        return y, None
    if lora_a.dtype != dtype:
        lora_a = lora_a.to(dtype)
    if lora_b.dtype != dtype:
        lora_b = lora_b.to(dtype)
    h_scale, up_scale = split_scaling(scaling, dtype)
    threshold = dropout.drop_threshold(dropout_p) if seed is not None else 0
    return backend.forward(
        x, weight, lora_a, lora_b, bias, seed, threshold, h_scale, up_scale
    )  # fmt: skip


def run_backward(
    dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, backend, need_x, need_a, need_b, need_bias
):  # fmt: skip
    """(dx, da, db, dbias) by `backend`; an empty tensor where a gradient is not needed."""
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    a, b = lora_a, lora_b
    off = switched_off(scaling, dropout_p)
    if off:
        a, b, h, seed, scaling = a[:0], b[:, :0], x.new_empty(math.prod(x.shape[:-1]), 0), None, 1.0
    if a.dtype != dtype:
        a = a.to(dtype)
    if b.dtype != dtype:
        b = b.to(dtype)
    h_scale, up_scale = split_scaling(scaling, dtype)
    threshold = dropout.drop_threshold(dropout_p) if seed is not None else 0
    dx, da, db, dbias = backend.backward(
        dy, x, weight, a, b, h, seed, threshold, h_scale, up_scale, lora_a.dtype, lora_b.dtype,
        need_x, need_a and not off, need_b and not off, need_bias,
    )  # fmt: skip
    if off:
        da = torch.zeros_like(lora_a) if need_a else da
        db = torch.zeros_like(lora_b) if need_b else db
    return dx, da, db, dbias


# ---- autograd ------------------------------------------------------------------------------------


class LoraLinear(torch.autograd.Function):
    """Eager mode's short way to a backend: one Python frame each way, no dispatcher in between."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend):
        y, h = _below_autocast(
            run_forward, x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend
        )
        ctx.save_for_backward(x, weight, lora_a, lora_b, h, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _backward(ctx, dy, run_backward)


def _setup_context(ctx, inputs, output):
    x, weight, lora_a, lora_b, _, seed, ctx.scaling, ctx.dropout_p, ctx.backend = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, run):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_lora_linear: double backward (create_graph=True) is not supported by this backend; "
            "pass backend='reference', which is differentiable any number of times"
        )
    if dy is None:
        return (None,) * 9
    x, weight, lora_a, lora_b, h, seed = ctx.saved_tensors
    need_x, _, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    dx, da, db, dbias = _below_autocast(
        run, dy, x, weight, lora_a, lora_b, h, seed, ctx.scaling, ctx.dropout_p, ctx.backend,
        need_x, need_a, need_b, need_bias,
    )  # fmt: skip
    return (
        dx if need_x else None,
        None,
        da if need_a else None,
        db if need_b else None,
        dbias if need_bias else None,
        None,
        None,
        None,
        None,
    )


def _below_autocast(run, x, *args):
    """Operands are cast once, on entry: inside, autocast would cast fp32 intermediates again."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return run(x, *args)
    with torch.autocast(device, enabled=False):
        return run(x, *args)


# ---- the differentiable op -----------------------------------------------------------------------


def _lora_linear(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend):
    chosen = backends.choose(backend, x)
    y, h = run_forward(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, chosen)
    return y, x.new_zeros(math.prod(x.shape[:-1]), lora_a.shape[0]) if h is None else h


def _lora_linear_backward(
    dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, backend, *needs
):  # fmt: skip
    chosen = backends.choose(backend, x)
    return run_backward(
        dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, chosen, *needs
    )  # fmt: skip


def _autocast_lora_linear(x, weight, lora_a, lora_b, bias, *rest):
    """x, weight and bias as autocast casts F.linear's; A and B keep their dtype."""
    device = x.device.type
    cast_x, _, cast_bias = autocast_operands(x, weight, bias)
    # An fp32 weight is cast inside, so that backward can save the parameter and not a 16-bit copy.
    with torch.autocast(device, enabled=False):
        return torch.ops.lora_kernels.lora_linear(cast_x, weight, lora_a, lora_b, cast_bias, *rest)


LIBRARY.impl("lora_linear", _lora_linear, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_backward", _lora_linear_backward, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("lora_linear", _autocast_lora_linear, _key)
torch.library.register_autograd(
    "lora_kernels::lora_linear",
    lambda ctx, dy, _: _backward(ctx, dy, torch.ops.lora_kernels.lora_linear_backward),
    setup_context=_setup_context,
    lib=LIBRARY,
)


# ---- fakes ---------------------------------------------------------------------------------------


def _fake(name):
    return torch.library.register_fake(f"lora_kernels::{name}", lib=LIBRARY)


@_fake("dropout_mask")
def _(seed, rows, cols, threshold):
    return seed.new_empty((rows, cols), dtype=torch.bool)


@_fake("down_proj")
def _(x, down, seed, threshold, scale):
    return x.new_empty(math.prod(x.shape[:-1]), down.shape[0])


@_fake("fused_gemm")
def _(x, weight, h, up, bias, seed, threshold, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_fake("weight_grad")
def _(h, x, seed, threshold, scale, dtype, transpose):
    r, k = h.shape[1], x.shape[-1]
    return x.new_empty((k, r) if transpose else (r, k), dtype=dtype)


@_fake("forward")
def _(x, weight, lora_a, lora_b, bias, seed, threshold, h_scale, up_scale):
    return _fake_outputs(x, weight, lora_a)


@_fake("lora_linear")
def _(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend):
    return _fake_outputs(x, weight, lora_a)


@_fake("backward")
def _(dy, x, weight, lora_a, lora_b, h, seed, threshold, h_scale, up_scale, a_dtype, b_dtype, *needs):
    a = torch.empty_like(lora_a, dtype=a_dtype, device=x.device)
    return _fake_grads(x, a, torch.empty_like(lora_b, dtype=b_dtype, device=x.device), *needs)


@_fake("lora_linear_backward")
def _(dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, backend, *needs):
    return _fake_grads(x, lora_a, lora_b, *needs)


def _fake_outputs(x, weight, lora_a):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0])


def _fake_grads(x, lora_a, lora_b, need_x, need_a, need_b, need_bias):
    return (
        x.new_empty(x.shape if need_x else 0),
        lora_a.new_empty(lora_a.shape) if need_a else x.new_empty(0),
        lora_b.new_empty(lora_b.shape) if need_b else x.new_empty(0),
        x.new_empty(lora_b.shape[0] if need_bias else 0),
    )

"""What the operators of `schemas` do: the run of one call, autograd, autocast, fakes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autocast, checks, composed, dropout
from . import backend as backends
from ._ops import add_op_namespace_prefix
from ._ops import ops as OPS
from .schemas import LIBRARY
from .shape_classes import Call

# What a device has no C++ kernel for is composed of the vendor's.
for _name, _default in (
    ("dropout_mask", dropout.reference_mask),
    ("down_proj", composed.down_proj),
    ("fused_gemm", composed.fused_gemm),
    ("weight_grad", composed.weight_grad),
):
    LIBRARY.impl(_name, torch.no_grad()(_default), "CompositeExplicitAutograd")


def _resolved(op: Callable) -> Callable:
    """`op` of tensors whose values are those in memory."""

    def resolve(arg: Any) -> Any:
        if isinstance(arg, list):
            return [resolve(one) for one in arg]
        return arg.resolve_neg() if isinstance(arg, Tensor) else arg

    return lambda *args: op(*map(resolve, args))


# torch's own fallback, which does this for every other operator, passes over a Tensor?[].
for _name in ("forward_group", "backward_group"):
    LIBRARY.impl(_name, _resolved(getattr(OPS, _name).default), "Negative")


# ---- one call, in eager mode and inside the op ---------------------------------------------------


class Plan(NamedTuple):
    """What a call's scalars and its x say about it, worked out once for forward and backward."""

    forward: Callable  # of the backend that serves it
    backward: Callable
    threshold: int
    h_scale: float
    up_scale: float
    off: bool  # the LoRA term is exactly zero: no Inf or NaN of A or B may reach y or a gradient
    by_shape: bool = False  # the choice is automatic and goes by shape: see `plan_of`


@functools.lru_cache(maxsize=4096)
def make_plan(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    scaling: float,
    dropout_p: float,
    dropped: bool,
) -> Plan:
    """`name`: of the backend, "" for the automatic choice. `dropped`: whether there is a mask."""
    backend = backends.choose(name, device, dtype)
    dropout.check_probability(
        dropout_p, "lora_linear", "dropout_p"
    )  # of the operator, called alone
    threshold = dropout.drop_threshold(dropout_p) if dropped else 0
    h_scale, up_scale = split_scaling(scaling, dtype)
    off = is_off(scaling, threshold)
    by_shape = name in ("", backends.FORWARD_ALONE) and backends.by_shape(device, dtype)
    return Plan(backend.forward, backend.backward, threshold, h_scale, up_scale, off, by_shape)


backends.on_change(make_plan.cache_clear)


def plan_of(
    name: str, x: Tensor, weight: Tensor, lora_a: Tensor, scaling: float, dropout_p: float,
    dropped: bool, inputs: tuple[Tensor | None, ...] = (),
) -> Plan:  # fmt: skip
    """`make_plan`, by shape where the choice goes by it: alike for forward and backward.

    `inputs`: what may require grad; below autograd, where none does, `name` says whether a backward
    pass follows.
    """
    plan = make_plan(name, x.device, x.dtype, scaling, dropout_p, dropped)
    if not plan.by_shape:
        return plan
    training = needs_grad(*inputs) if inputs else name != backends.FORWARD_ALONE
    call = call_of(x, weight, lora_a, plan.off, plan.threshold > 0, training)
    found = backends.choose("", x.device, x.dtype, call)
    return make_plan(found.name, x.device, x.dtype, scaling, dropout_p, dropped)


def call_of(
    x: Tensor, weight: Tensor, lora_a: Tensor, off: bool, dropped: bool, training: bool
) -> Call:
    """What the choice by shape knows of a call; an adapter that is off has rank 0."""
    n, k = weight.shape
    m = x.numel() // k if k else 0
    return Call(m, n, k, 0 if off else lora_a.shape[0], dropped and not off, training)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def split_scaling(scaling: float, dtype: torch.dtype) -> tuple[float, float]:
    """(h_scale, up_scale), h_scale · up_scale = scaling.

    In fp16, where h might overflow although y does not, the smallest power of two >= |scaling| is
    left for the up projection: |h_scale| is in (1/2, 1], so h is finite wherever an unscaled one
    is.
    """
    if dtype != torch.float16 or scaling == 0:
        return scaling, 1.0
    mantissa, exponent = math.frexp(scaling)  # |mantissa| in [1/2, 1)
    if abs(mantissa) == 0.5:
        mantissa, exponent = 2 * mantissa, exponent - 1
    return mantissa, math.ldexp(1.0, exponent)


def is_off(scaling: float, threshold: int) -> bool:
    """Whether the LoRA term is exactly zero."""
    return scaling == 0 or threshold == dropout.RANGE


def one_dtype(x, weight, lora_a, lora_b, seed, off):
    """(x, weight, lora_a, lora_b, seed) as a backend takes them."""
    dtype = x.dtype
    if off:  # an adapter that is off is an adapter of rank 0
        lora_a, lora_b, seed = lora_a[:0], lora_b[:, :0], None
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if lora_a.dtype is not dtype:
        lora_a = lora_a.to(dtype)
    if lora_b.dtype is not dtype:
        lora_b = lora_b.to(dtype)
    return x, weight, lora_a, lora_b, seed


def run_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """(y, h): operands brought to one dtype and handed to the plan's backend."""
    x, weight, lora_a, lora_b, seed = one_dtype(x, weight, lora_a, lora_b, seed, plan.off)
    return plan.forward(
        x, weight, lora_a, lora_b, bias, seed, plan.threshold, plan.h_scale, plan.up_scale
    )


def run_backward(dy, x, weight, lora_a, lora_b, h, seed, plan, need_x, need_a, need_b, need_bias):
    """(dx, da, db, dbias); an empty tensor where a gradient is not needed."""
    if plan.off:
        return _backward_off(dy, x, weight, lora_a, lora_b, plan, need_x, need_a, need_b, need_bias)
    wide_a, wide_b = lora_a.dtype is not x.dtype, lora_b.dtype is not x.dtype
    x, weight, lora_a, lora_b, seed = one_dtype(x, weight, lora_a, lora_b, seed, False)
    return plan.backward(
        dy, x, weight, lora_a, lora_b, h, seed, plan.threshold, plan.h_scale, plan.up_scale,
        wide_a, wide_b, need_x, need_a, need_b, need_bias,
    )  # fmt: skip


def _backward_off(dy, x, weight, lora_a, lora_b, plan, need_x, need_a, need_b, need_bias):
    on = plan._replace(off=False)
    h = x.new_empty(math.prod(x.shape[:-1]), 0)
    dx, da, db, dbias = run_backward(
        dy, x, weight, lora_a[:0], lora_b[:, :0], h, None, on, need_x, False, False, need_bias
    )
    da = lora_a.new_zeros(lora_a.shape) if need_a else da
    db = lora_b.new_zeros(lora_b.shape) if need_b else db
    return dx, da, db, dbias


# ---- autograd ------------------------------------------------------------------------------------


def shape_alone(dy: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] for a backward pass that does not read it: one element, whatever the shape."""
    return dy.new_empty(()).expand(*dy.shape[:-1], weight.shape[1])


class LoraLinear(torch.autograd.Function):
    """Eager mode's short way to a backend: one Python frame each way, no dispatcher in between."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, seed, plan):
        y, h = run_forward(x, weight, lora_a, lora_b, bias, seed, plan)
        kept = x if lora_a.requires_grad else None  # dA alone reads it
        ctx.save_for_backward(kept, weight, lora_a, lora_b, h, seed)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            _no_double_backward()
        need_x, _, need_a, need_b, need_bias, _, _ = ctx.needs_input_grad
        x, weight, lora_a, lora_b, h, seed = ctx.saved_tensors
        if x is None:
            x = shape_alone(dy, weight)
        dx, da, db, dbias = run_backward(
            dy, x, weight, lora_a, lora_b, h, seed, ctx.plan, need_x, need_a, need_b, need_bias
        )
        return (
            dx if need_x else None,
            None,
            da if need_a else None,
            db if need_b else None,
            dbias if need_bias else None,
            None,
            None,
        )


def _no_double_backward(op="fused_lora_linear"):
    raise RuntimeError(
        f"{op}: double backward (create_graph=True) is not supported by this backend; "
        "pass backend='reference', which is differentiable any number of times"
    )


def no_transforms(op="fused_lora_linear"):
    """Raises inside torch.func's transforms, which the autograd functions here know nothing of."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: torch.func transforms (vmap, grad, jvp, jacrev, ...) are not supported by this "
            "backend; pass backend='reference', which is plain PyTorch"
        )


# ---- the differentiable op -----------------------------------------------------------------------


def _lora_linear(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend):
    plan = plan_of(backend, x, weight, lora_a, scaling, dropout_p, seed is not None)
    y, h = run_forward(x, weight, lora_a, lora_b, bias, seed, plan)
    return y, x.new_zeros(h.shape[0], lora_a.shape[0]) if plan.off else h


def _lora_linear_backward(
    dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, backend, *needs
):
    if x is None:
        x = shape_alone(dy, weight)
    plan = plan_of(backend, x, weight, lora_a, scaling, dropout_p, seed is not None)
    return run_backward(dy, x, weight, lora_a, lora_b, h, seed, plan, *needs)


def _setup_context(ctx, inputs, output):
    x, weight, lora_a, lora_b, _, seed, *ctx.scalars = inputs
    # A sharding rule asks x where it lies.
    kept = x if lora_a.requires_grad or checks.is_sharded(x) else None
    ctx.save_for_backward(kept, weight, lora_a, lora_b, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    if torch.is_grad_enabled():
        _no_double_backward()
    need_x, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
    dx, da, db, dbias = OPS.lora_linear_backward(
        dy, *ctx.saved_tensors, *ctx.scalars, need_x, need_a, need_b, need_bias
    )
    grads = (
        dx if need_x else None,
        None,
        da if need_a else None,
        db if need_b else None,
        dbias if need_bias else None,
    )
    return grads + (None,) * 4


def _autocast_lora_linear(x, weight, lora_a, lora_b, bias, *rest):
    """x, weight and bias as autocast casts F.linear's; A and B keep their dtype."""
    cast_x, cast_bias = autocast.cast(x), None if bias is None else autocast.cast(bias)
    # An fp32 weight is cast inside, so that backward can save the parameter and not a 16-bit copy.
    with autocast.off(x.device.type):
        return OPS.lora_linear(cast_x, weight, lora_a, lora_b, cast_bias, *rest)


LIBRARY.impl("lora_linear", _lora_linear, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_backward", _lora_linear_backward, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("lora_linear", _autocast_lora_linear, _key)
torch.library.register_autograd(
    add_op_namespace_prefix("lora_linear"), _op_backward, setup_context=_setup_context, lib=LIBRARY
)


# ---- fakes ---------------------------------------------------------------------------------------


def _fake(name):
    return torch.library.register_fake(add_op_namespace_prefix(name), lib=LIBRARY)


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
def _(h, x, seed, threshold, scale, wide, transpose):
    r, k = h.shape[1], x.shape[-1]
    dtype = torch.float32 if wide else x.dtype
    return x.new_empty((k, r) if transpose else (r, k), dtype=dtype)


@_fake("forward")
@_fake("forward_triton")
def _(x, weight, lora_a, lora_b, bias, seed, threshold, h_scale, up_scale):
    return _fake_outputs(x, weight, lora_a)


@_fake("forward_as")
def _(x, weight, lora_a, lora_b, bias, seed, threshold, h_scale, up_scale, form, tile_n, group):
    return _fake_outputs(x, weight, lora_a)


@_fake("lora_linear")
def _(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend):
    return _fake_outputs(x, weight, lora_a)


@_fake("backward")
@_fake("backward_triton")
def _(dy, x, weight, lora_a, lora_b, h, seed, threshold, h_scale, up_scale, wide_a, wide_b, *needs):
    a = lora_a.float() if wide_a else lora_a
    b = lora_b.float() if wide_b else lora_b
    return _fake_grads(x, a, b, *needs)


@_fake("backward_as")
def _(
    dy, x, weight, lora_a, lora_b, h, seed, threshold, h_scale, up_scale, wide_a, wide_b,
    need_x, need_a, need_b, need_bias, form, tile_n, group,
):  # fmt: skip
    a = lora_a.float() if wide_a else lora_a
    b = lora_b.float() if wide_b else lora_b
    return _fake_grads(x, a, b, need_x, need_a, need_b, need_bias)


@_fake("lora_linear_backward")
def _(dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, backend, *needs):
    x = shape_alone(dy, weight) if x is None else x
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

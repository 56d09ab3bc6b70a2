"""`fused_lora_linear_group`: projections that share one input, such as q/k/v or gate/up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autocast, checks, composed, dropout, ops, reference
from . import backend as backends
from ._ops import add_op_namespace_prefix
from ._ops import ops as OPS
from .schemas import LIBRARY

OP = "fused_lora_linear_group"


def fused_lora_linear_group(
    x: Tensor,  # [..., K]
    weights: Sequence[Tensor],  # each [N, K], with an N of its own
    lora_as: Sequence[Tensor],  # each [r, K], with an r of its own
    lora_bs: Sequence[Tensor],  # each [N, r]
    biases: Sequence[Tensor | None] | None = None,  # each [N]
    *,
    scalings: float | Sequence[float],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """[fused_lora_linear(x, weight, ...) for each projection], saving x once, with one dx.

    Each y is bit for bit that of the separate call by the same backend. dx is one tensor, in which
    backward adds up the group; an output that no gradient reaches costs nothing there.

    Args:
        x: [..., K], as for `fused_lora_linear`.
        weights, lora_as, lora_bs: one entry a projection, at least one, as for `fused_lora_linear`;
            N, r and the adapters' dtype may differ between projections.
        biases: one entry a projection, each [N] or None; or None.
        scalings: one number for all, or one a projection.
        dropout_p: drop probability of x in every LoRA term; each projection has its own mask.
        seeds: one seed tensor a projection, as for `fused_lora_linear`. None, or a None in it,
            draws one if dropout_p > 0, in the order of the projections, as separate calls would.
        backend: as for `fused_lora_linear`.

    Returns:
        A list of [..., N], contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: the lists differ in length, or an argument of a projection, which the
            message names by its index, is of the wrong type, shape, device, dtype or range.
        RuntimeError: a weight requires grad, or the named backend cannot serve the call; later, a
            double backward, which only backend="reference" supports.
        NotImplementedError: a transform of torch.func around a backend other than "reference".

    Saved for backward: x once if a lora_a requires grad, and of each projection weight, lora_a,
    lora_b, h [M, r], seed.

    Equivalent to::

        [
            lora_kernels.fused_lora_linear(
                x, weight, lora_a, lora_b, bias, scaling=scaling, dropout_p=dropout_p, seed=seed,
                backend=backend,
            )
            for weight, lora_a, lora_b, bias, scaling, seed in zip(
                weights, lora_as, lora_bs, biases, scalings, seeds
            )
        ]
    """
    weights, lora_as, lora_bs, biases, scalings, seeds = _as_lists(
        weights, lora_as, lora_bs, biases, scalings, seeds
    )
    if _validate(x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seeds):
        scalings, dropout_p = [float(s) for s in scalings], float(dropout_p)
        # Weights are cast inside, so that backward saves the parameters and not 16-bit copies.
        x, biases = autocast.cast(x), [None if b is None else autocast.cast(b) for b in biases]
    dropped = dropout.drops(dropout_p)
    seeds = [_seed(seed, x) if dropped else None for seed in seeds]

    name = backends.requested(backend)
    if name == "reference" or (name == "" and x.dtype == torch.float64):
        return [
            reference.lora_linear(x, *operands, scaling=scaling, dropout_p=dropout_p, seed=seed)
            for *operands, scaling, seed in zip(
                weights, lora_as, lora_bs, biases, scalings, seeds, strict=True
            )
        ]
    if torch.compiler.is_compiling():
        if name == "" and not ops.needs_grad(x, *lora_as, *lora_bs, *biases):
            name = backends.FORWARD_ALONE
        return OPS.lora_linear_group(
            x, weights, lora_as, lora_bs, [x.new_empty(0) if b is None else b for b in biases],
            seeds if dropped else [], scalings, dropout_p, name,
        )[0]  # fmt: skip
    ops.no_transforms(OP)
    operands = (*weights, *lora_as, *lora_bs, *biases, *seeds)
    plan = plan_of(name, x, weights, lora_as, scalings, dropout_p, dropped, operands)
    try:
        return list(LoraLinearGroup.apply(plan, x, *operands))
    except RuntimeError:  # of a layout, say, which the cheap test does not look at
        _validate(x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seeds, closely=True)
        raise


# ---- arguments -----------------------------------------------------------------------------------


def _as_lists(weights, lora_as, lora_bs, biases, scalings, seeds) -> list[list[Any]]:
    """The arguments as lists of one length, with the defaults spelled out."""
    weights = _as_list("weights", weights)
    count = len(weights)
    if count == 0:
        raise ValueError(f"{OP}: weights must hold one tensor a projection, but is empty")
    one_number = isinstance(scalings, Tensor) or not hasattr(scalings, "__iter__")
    lists = {
        "lora_as": lora_as,
        "lora_bs": lora_bs,
        "biases": [None] * count if biases is None else biases,
        "scalings": [scalings] * count if one_number else scalings,
        "seeds": [None] * count if seeds is None else seeds,
    }
    found = [weights]
    for name, value in lists.items():
        found.append(_as_list(name, value))
        if len(found[-1]) != count:
            raise ValueError(
                f"{OP}: {name} must have one entry for each of the {count} weights, but has "
                f"{len(found[-1])}"
            )
    return found


def _as_list(name: str, value) -> list[Any]:
    if isinstance(value, Tensor) or not hasattr(value, "__iter__"):
        raise TypeError(
            f"{OP}: {name} must be a sequence with one entry a projection, but got "
            f"{type(value).__name__}; put it in a list"
        )
    return list(value)


def _validate(
    x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seeds, closely: bool = False
) -> bool:
    """Raises for a bad projection. Whether one is unusual, or autocast is on: then normalise."""
    unusual = autocast.enabled(x.device.type) if isinstance(x, Tensor) else True
    each = zip(weights, lora_as, lora_bs, biases, scalings, seeds, strict=True)
    for i, (weight, lora_a, lora_b, bias, scaling, seed) in enumerate(each):
        args = (x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
        if not closely and checks.compute_dtype(*args) is not None:
            continue
        unusual = True
        try:
            checks.validate(*args)
        except (TypeError, ValueError, RuntimeError) as error:
            message = str(error).removeprefix(f"{checks.OP}: ")
            raise type(error)(f"{OP}: projection {i}: {message}") from None
    return unusual


def _seed(seed: Tensor | None, x: Tensor) -> Tensor:
    return dropout.draw_seed(x.device) if seed is None else seed.contiguous()


# ---- one call, in eager mode and inside the op ---------------------------------------------------


class Plan(NamedTuple):
    """`ops.Plan` of a group: one entry a projection where they may differ."""

    forward: Callable
    backward: Callable
    threshold: int
    h_scales: tuple[float, ...]
    up_scales: tuple[float, ...]
    offs: tuple[bool, ...]
    by_shape: bool = False

    def take(self, used: list[int]) -> Plan:
        """The plan of some of the projections."""

        def pick(part: tuple) -> tuple:
            return tuple(part[i] for i in used)

        return self._replace(
            h_scales=pick(self.h_scales), up_scales=pick(self.up_scales), offs=pick(self.offs)
        )


@functools.lru_cache(maxsize=4096)
def make_plan(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    scalings: tuple[float, ...],
    dropout_p: float,
    dropped: bool,
) -> Plan:
    """As `ops.make_plan`."""
    plans = [ops.make_plan(name, device, dtype, s, dropout_p, dropped) for s in scalings]
    backend = backends.choose(name, device, dtype)
    forward, backward = composed.group_flow(backend.forward, composed.adding(backend.backward))
    return Plan(
        backend.group_forward or forward,
        backend.group_backward or backward,
        plans[0].threshold,
        tuple(p.h_scale for p in plans),
        tuple(p.up_scale for p in plans),
        tuple(p.off for p in plans),
        plans[0].by_shape,
    )


backends.on_change(make_plan.cache_clear)


def plan_of(
    name, x, weights, lora_as, scalings, dropout_p, dropped, operands: tuple = ()
) -> Plan:  # fmt: skip
    """As `ops.plan_of`; where the choice goes by shape, of what every projection would take."""
    device, dtype, scalings = x.device, x.dtype, tuple(scalings)
    plan = make_plan(name, device, dtype, scalings, dropout_p, dropped)
    if not plan.by_shape:
        return plan
    training = ops.needs_grad(x, *operands) if operands else name != backends.FORWARD_ALONE
    each = zip(weights, lora_as, plan.offs, strict=True)
    calls = [ops.call_of(x, *one, plan.threshold > 0, training) for one in each]
    names = {backends.choose("", device, dtype, call).name for call in calls}
    if len(names) > 1:
        names = {backends.choose("", device, dtype).name}
    return make_plan(names.pop(), device, dtype, scalings, dropout_p, dropped)


def _one_dtype(x, weights, lora_as, lora_bs, seeds, offs):
    """`ops.one_dtype` of each projection, as four lists."""
    each = zip(weights, lora_as, lora_bs, seeds, offs, strict=True)
    return map(list, zip(*(ops.one_dtype(x, *one)[1:] for one in each), strict=True))


def run_forward(x, weights, lora_as, lora_bs, biases, seeds, plan: Plan):
    """(ys, hs): operands brought to one dtype and handed to the plan's backend."""
    weights, lora_as, lora_bs, seeds = _one_dtype(x, weights, lora_as, lora_bs, seeds, plan.offs)
    return plan.forward(
        x, weights, lora_as, lora_bs, biases, seeds, plan.threshold, plan.h_scales, plan.up_scales
    )


def run_backward(
    x, dys, weights, lora_as, lora_bs, hs, seeds, plan: Plan, need_x, need_a, need_b, need_bias
):
    """(dx, das, dbs, dbiases); an empty tensor where a gradient is not needed."""
    offs = plan.offs
    wide_a, wide_b = ([t.dtype is not x.dtype for t in ts] for ts in (lora_as, lora_bs))
    weights, low_as, low_bs, seeds = _one_dtype(x, weights, lora_as, lora_bs, seeds, offs)
    hs = [h[:, :0] if off else h for h, off in zip(hs, offs, strict=True)]
    dx, das, dbs, dbiases = plan.backward(
        x, dys, weights, low_as, low_bs, hs, seeds, plan.threshold, plan.h_scales, plan.up_scales,
        wide_a, wide_b, need_x, need_a, need_b, need_bias,
    )  # fmt: skip
    for i, off in enumerate(offs):  # no Inf or NaN of A or B may reach a gradient
        if off and need_a[i]:
            das[i] = lora_as[i].new_zeros(lora_as[i].shape)
        if off and need_b[i]:
            dbs[i] = lora_bs[i].new_zeros(lora_bs[i].shape)
    return dx, das, dbs, dbiases


def _gradients(dys, saved, needs, run: Callable):
    """(dx, das, dbs, dbiases), None where not needed, by `run` of projections that have a dy."""
    need_x, *need_each = needs
    none = [None] * len(dys)
    grads: list[list[Tensor | None]] = [list(none), list(none), list(none)]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    if not used:
        return None, *grads
    if torch.is_grad_enabled():
        ops._no_double_backward(OP)
    x, *lists = saved
    taken = ([part[i] for i in used] for part in (dys, *lists))
    dx, *found = run(x, *taken, used, need_x, *([need[i] for i in used] for need in need_each))
    for kind, need, values in zip(grads, need_each, found, strict=True):
        for i, value in zip(used, values, strict=True):
            kind[i] = value if need[i] else None
    return dx if need_x else None, *grads


def _split(flat: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [flat[i : i + count] for i in range(0, len(flat), count)]


# ---- autograd ------------------------------------------------------------------------------------


class LoraLinearGroup(torch.autograd.Function):
    """Eager mode's short way to a backend; `operands` are five lists, one after the other."""

    @staticmethod
    def forward(ctx, plan, x, *operands):
        weights, lora_as, lora_bs, biases, seeds = _split(operands, len(plan.offs))
        ys, hs = run_forward(x, weights, lora_as, lora_bs, list(biases), seeds, plan)
        kept = x if any(a.requires_grad for a in lora_as) else None  # dA alone reads it
        ctx.save_for_backward(kept, *weights, *lora_as, *lora_bs, *hs, *seeds)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        count = len(dys)
        x, *saved = ctx.saved_tensors
        _, need_x, *rest = ctx.needs_input_grad
        _, *need_each, _ = _split(rest, count)

        def run(x, dys, weights, lora_as, lora_bs, hs, seeds, used, *needs):
            plan = ctx.plan.take(used)
            x = ops.shape_alone(dys[0], weights[0]) if x is None else x
            return run_backward(x, dys, weights, lora_as, lora_bs, hs, seeds, plan, *needs)

        dx, das, dbs, dbiases = _gradients(
            dys, (x, *_split(saved, count)), (need_x, *need_each), run
        )
        none = [None] * count
        return None, dx, *none, *das, *dbs, *dbiases, *none


# ---- the differentiable op -----------------------------------------------------------------------


def _lora_linear_group(x, weights, lora_as, lora_bs, biases, seeds, scalings, dropout_p, backend):
    plan = plan_of(backend, x, weights, lora_as, scalings, dropout_p, bool(seeds))
    biases = [b if b.numel() else None for b in biases]
    seeds = seeds or [None] * len(weights)
    ys, hs = run_forward(x, weights, lora_as, lora_bs, biases, seeds, plan)
    for i, off in enumerate(plan.offs):
        if off:
            hs[i] = x.new_zeros(hs[i].shape[0], lora_as[i].shape[0])
    return ys, hs


def _lora_linear_group_backward(
    x, dys, weights, lora_as, lora_bs, hs, seeds, scalings, dropout_p, backend, *needs
):
    x = ops.shape_alone(dys[0], weights[0]) if x is None else x
    plan = plan_of(backend, x, weights, lora_as, scalings, dropout_p, bool(seeds))
    seeds = seeds or [None] * len(weights)
    return run_backward(x, dys, weights, lora_as, lora_bs, hs, seeds, plan, *needs)


def _setup_context(ctx, inputs, output):
    x, weights, lora_as, lora_bs, _, seeds, *ctx.scalars = inputs
    hs = output[1]
    kept = x if any(a.requires_grad for a in lora_as) else None
    ctx.save_for_backward(kept, *weights, *lora_as, *lora_bs, *hs, *seeds)
    ctx.mark_non_differentiable(*hs)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dys, _):
    count, (scalings, dropout_p, backend) = len(dys), ctx.scalars
    x, *saved = ctx.saved_tensors
    need_x, _, *need_each, need_seeds, _, _, _ = ctx.needs_input_grad
    weights, lora_as, lora_bs, hs, *seeds = _split(saved, count)

    def run(x, dys, weights, lora_as, lora_bs, hs, seeds, used, *needs):
        return OPS.lora_linear_group_backward(
            x, dys, weights, lora_as, lora_bs, hs, [s for s in seeds if s is not None],
            [scalings[i] for i in used], dropout_p, backend, *needs,
        )  # fmt: skip

    dropped = seeds[0] if seeds else [None] * count
    dx, das, dbs, dbiases = _gradients(
        dys, (x, weights, lora_as, lora_bs, hs, dropped), (need_x, *need_each), run
    )
    return dx, [None] * count, das, dbs, dbiases, [None] * len(need_seeds), None, None, None


LIBRARY.impl("lora_linear_group", _lora_linear_group, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_group_backward", _lora_linear_group_backward, "CompositeExplicitAutograd")
torch.library.register_autograd(
    add_op_namespace_prefix("lora_linear_group"),
    _op_backward,
    setup_context=_setup_context,
    lib=LIBRARY,
)


# ---- fakes ---------------------------------------------------------------------------------------


@ops._fake("forward_group")
@ops._fake("lora_linear_group")
def _(x, weights, lora_as, *args):
    each = [ops._fake_outputs(x, *one) for one in zip(weights, lora_as, strict=True)]
    return [y for y, _ in each], [h for _, h in each]


@ops._fake("backward_group")
def _(x, dys, weights, lora_as, lora_bs, hs, seeds, threshold, h_scales, up_scales, wide_a, wide_b,
      *needs):  # fmt: skip
    low = ((lora_as, wide_a), (lora_bs, wide_b))
    lora_as, lora_bs = (
        [t.float() if wide else t for t, wide in zip(ts, wides, strict=True)] for ts, wides in low
    )
    return _fake_grads(x, lora_as, lora_bs, *needs)


@ops._fake("lora_linear_group_backward")
def _(x, dys, weights, lora_as, lora_bs, hs, seeds, scalings, dropout_p, backend, *needs):
    x = ops.shape_alone(dys[0], weights[0]) if x is None else x
    return _fake_grads(x, lora_as, lora_bs, *needs)


def _fake_grads(x, lora_as, lora_bs, need_x, *need_each):
    each = zip(lora_as, lora_bs, *need_each, strict=True)
    grads = [ops._fake_grads(x, a, b, False, *needs)[1:] for a, b, *needs in each]
    return x.new_empty(x.shape if need_x else 0), *map(list, zip(*grads, strict=True))

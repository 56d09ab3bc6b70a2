"""`fused_lora_linear`, the one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, checks, dropout, reference
from . import backend as backends
from ._ops import ops as OPS
from .ops import LoraLinear, make_plan, needs_grad, no_transforms, plan_of


def fused_lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    bias: Tensor | None = None,  # [N]
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x·weightᵀ + scaling · dropout(x)·lora_aᵀ·lora_bᵀ + bias.

    Gradients go to x, lora_a, lora_b and bias, each only if it requires one; never to weight.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64, any strides.
        weight: [N, K] in x's dtype, frozen: it gets no gradient and no gradient buffer.
        lora_a: [r, K] and lora_b: [N, r], any r >= 0, in x's dtype, or float32 with a 16-bit x:
            then they are cast to x's dtype (x never is) and their gradients come back in float32,
            rounded once.
        bias: [N] in x's dtype, or None.
        scaling: finite factor of the LoRA term. 0 switches it off: y is exactly the frozen
            linear, and the gradients of lora_a and lora_b are exactly zero. Under torch.compile a
            scaling that has changed is multiplied into lora_b, so that no value but 0 recompiles.
        dropout_p: drop probability of x in the LoRA term; it applies whenever it is > 0, so pass
            0 in eval mode, as to scaled_dot_product_attention. Dropped elements are selected to
            zero (an Inf or NaN under one vanishes), survivors scaled by 1 /
            `keep_probability(dropout_p)`.
        seed: int64 tensor [2] = (seed, offset) or [4] = (seed, offset, row0, col0) on x's device,
            which fixes the mask (`dropout_mask`); row0 and col0 place x in a larger matrix that
            is sharded. None draws one from torch's default generator of that device if dropout_p
            > 0.
        backend: None for the best available (`explain` says which and why), or a name, which then
            serves or raises. `use_backend` and LORA_KERNELS_BACKEND set it for all calls.

    Returns:
        [..., N], contiguous, in x's dtype. Under torch.autocast x, weight and bias are cast as
        F.linear's are, lora_a and lora_b keep their dtype.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device, dtype or range.
        NotImplementedError: DTensors in placements without a sharding rule, or a transform of
            torch.func around a backend other than "reference".
        RuntimeError: weight requires grad, or the named backend cannot serve the call; later, a
            double backward, which only backend="reference" supports.

    Saved for backward: weight, lora_a, lora_b, h [M, r], seed, and x if lora_a requires grad.
    Never a mask or a dropped copy of x.

    DTensors on one mesh are served as `lora_kernels.distributed.sharded_lora_linear` says.

    Equivalent to::

        mask = lora_kernels.dropout_mask(seed, x.shape, dropout_p)
        x_dropped = torch.where(mask, x / lora_kernels.keep_probability(dropout_p), 0)
        y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(x_dropped, lora_a), lora_b)

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1;
    dropout placed as in PEFT and loralib.
    """
    dtype = checks.compute_dtype(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    if dtype is None:
        checks.validate(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, sharded=True)
        if checks.is_sharded(x):
            from . import sharded

            return sharded.run(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
        scaling, dropout_p = float(scaling), float(dropout_p)
        x, bias = autocast.cast(x), None if bias is None else autocast.cast(bias)
        seed = None if seed is None else seed.contiguous()
    elif x.dtype is not dtype or (bias is not None and bias.dtype is not dtype):  # by autocast
        # The weight is cast inside, so that backward saves the parameter and not a 16-bit copy.
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    name = backends.requested(backend)
    if not dropout.drops(dropout_p):
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(x.device)

    if name == "reference" or (name == "" and x.dtype == torch.float64):
        return reference.lora_linear(
            x, weight, lora_a, lora_b, bias, scaling=scaling, dropout_p=dropout_p, seed=seed
        )
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # sympy comes with it

        if not has_static_value(scaling):  # as the op's float it would become a guard on its value
            lora_b, scaling = (lora_b, 0.0) if scaling == 0 else (lora_b * scaling, 1.0)
        if name == "" and not needs_grad(x, lora_a, lora_b, bias):
            name = backends.FORWARD_ALONE
        return OPS.lora_linear(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, name)[0]
    no_transforms()
    plan = make_plan(name, x.device, x.dtype, scaling, dropout_p, seed is not None)
    if plan.by_shape:
        inputs = (x, lora_a, lora_b, bias)
        plan = plan_of(name, x, weight, lora_a, scaling, dropout_p, seed is not None, inputs)
    try:
        return LoraLinear.apply(x, weight, lora_a, lora_b, bias, seed, plan)
    except RuntimeError:  # of a layout, say, which the cheap test does not look at
        checks.validate(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
        raise

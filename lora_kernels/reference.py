"""The definition: the contract in plain PyTorch, differentiable any number of times, fp64 too."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + scaling · dropout(x)·lora_aᵀ·lora_bᵀ + bias.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16.
        weight: [N, K], frozen: it gets no gradient.
        lora_a: [r, K]; lora_b: [N, r]. In x's dtype, or float32 with a 16-bit x.
        bias: [N] or None.
        scaling: factor of the LoRA term.
        dropout_p: drop probability of x in the LoRA term; applies whenever it is > 0.
        seed: int64 [2] or [4] (see `lora_kernels.dropout`); drawn when None and dropout_p > 0.

    Returns:
        [..., N] in x's dtype (under autocast: in autocast's).

    Both products are accumulated in fp32 (fp64 for an fp64 x); h = scaling · dropout(x)·lora_aᵀ is
    rounded once to x's dtype, and so is y. This is the one path that makes and saves a mask.

    Equivalent to::

        mask = lora_kernels.dropout_mask(seed, x.shape, dropout_p)
        x_dropped = torch.where(mask, x / lora_kernels.keep_probability(dropout_p), 0)
        y = F.linear(x, weight, bias) + scaling * F.linear(F.linear(x_dropped, lora_a), lora_b)
    """
    if seed is None and dropout.drops(dropout_p):
        seed = dropout.draw_seed(x.device)
    x, bias = autocast.cast(x), None if bias is None else autocast.cast(bias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with autocast.off(x.device.type):
        wide_x, wide_w = x.to(wide), weight.detach().to(x.dtype).to(wide)
        y = torch.nn.functional.linear(wide_x, wide_w, None if bias is None else bias.to(wide))
        if scaling != 0 and (keep := dropout.keep_probability(dropout_p)) > 0:
            a, b = (_as_cast(t, x.dtype).to(wide) for t in (lora_a, lora_b))
            if keep < 1:
                assert seed is not None  # given or drawn: keep < 1 just where `drops` says so
                wide_x = _drop(wide_x, seed, dropout_p) / keep
            h = (scaling * torch.nn.functional.linear(wide_x, a)).to(x.dtype)
            y = y + torch.nn.functional.linear(h.to(wide), b)
        elif lora_a.requires_grad or lora_b.requires_grad:
            # Switched off: gradients are exactly zero, not absent, and no Inf or NaN leaks from A
            # or B.
            y = y + 0 * (_zero(lora_a) + _zero(lora_b)).to(wide)
        return y.to(x.dtype)


def _as_cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that `t` has in `dtype`, in t's own dtype, so that its gradient is not rounded."""
    return t if t.dtype == dtype else _Rounded.apply(t, dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, dtype):
        return t.to(dtype).to(t.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
    mask = dropout.reference_mask(seed, rows.shape[0], x.shape[-1], dropout.drop_threshold(p))
    return torch.where(mask.view(x.shape), x, 0.0)


def _zero(parameter: Tensor) -> Tensor:
    return torch.where(
        torch.zeros((), dtype=torch.bool, device=parameter.device), parameter, 0
    ).sum()

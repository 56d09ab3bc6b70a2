"""`explain`: which backend serves a call, what it would launch, and why each other would not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import autocast, checks, dropout, ops
from . import backend as backends


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that would run, and why each other would not."""

    backend: str
    plan: str
    reason: str
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.plan}", f"  chosen: {self.reason}"]
        lines += [f"  not {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


def explain(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend `fused_lora_linear` would run for this call, and why each other would not.

    Args: as `fused_lora_linear`.

    Returns:
        Explanation with `backend`, `plan`, `reason`, `passed_over`; str() prints it.

    Raises:
        As `fused_lora_linear` would for the same arguments.
    """
    checks.validate(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    training = ops.needs_grad(x, lora_a, lora_b, bias)
    x = autocast.cast(x)
    off = ops.is_off(scaling, dropout.drop_threshold(dropout_p))
    call = ops.call_of(x, weight, lora_a, off, dropout.drops(dropout_p), training)
    name, passed_over = backends.automatic(x.device, x.dtype, call)
    for later in backends._ORDER[backends._ORDER.index(name) + 1 :]:
        passed_over[later] = (
            backends._REGISTRY[later].missing() or f"comes after {name} in the fixed order"
        )
    reason = f"first in the fixed order that serves {x.dtype} on {x.device}"
    if (evidence := backends._REGISTRY[name].evidence) is not None:
        reason += f"; {evidence(x.device).find(x.dtype, call).why}"
    if forced := backends.requested(backend):
        name = backends.choose(forced, x.device, x.dtype).name
        source = "the backend argument" if backend else f"use_backend or {backends.ENV}"
        reason = f"forced by {source}"
        passed_over = {n: w for n, w in passed_over.items() if n != name}
    found = backends._REGISTRY[name]
    masked = seed if dropout.drops(dropout_p) else None
    if masked is None and dropout.drops(dropout_p):
        masked = torch.zeros(2, dtype=torch.int64, device=x.device)  # as good as a drawn one
    plan = found.summary
    if found.plan:
        _, up_scale = ops.split_scaling(scaling, x.dtype)
        x, weight, lora_a, lora_b, masked = ops.one_dtype(x, weight, lora_a, lora_b, masked, off)
        plan = found.plan(x, weight, lora_a, lora_b, masked, up_scale)
    return Explanation(name, plan, reason, passed_over)

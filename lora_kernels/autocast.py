"""torch.autocast as F.linear sees it: x, weight and bias are cast; float64 and adapters are not."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def enabled(device: str) -> bool:
    """Whether autocast is on for this device type; False where it does not exist ("meta")."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast(t: Tensor) -> Tensor:
    """`t` as autocast would hand it to F.linear: itself where autocast is off."""
    device = t.device.type
    if not enabled(device) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(device))


def off(device: str):
    """A context without autocast, for work on operands that have their final dtype."""
    return torch.autocast(device, enabled=False) if enabled(device) else contextlib.nullcontext()

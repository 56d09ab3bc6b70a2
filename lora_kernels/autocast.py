"""torch.autocast as F.linear sees it: x, weight and bias are cast; float64 and adapters are not."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def enabled(device: str) -> bool:
    """Whether autocast is on for this device type; False where it does not exist ("meta")."""
    if not torch._C._is_any_autocast_enabled():  # one question where the usual answer takes two
        return False
    # Not torch.amp.is_autocast_available, which the compiler of torch 2.11 cannot trace.
    return device != "meta" and torch.is_autocast_enabled(device)


def cast(t: Tensor) -> Tensor:
    """`t` as autocast would hand it to F.linear: itself where autocast is off."""
    device = t.device.type
    if not enabled(device) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(device))


class _Off:
    """torch.autocast(device, enabled=False) where it is enabled, without its bookkeeping."""

    def __init__(self, device: str):
        self._device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device, True)


def off(device: str):
    """A context without autocast, for work on operands that have their final dtype."""
    return _Off(device) if enabled(device) else contextlib.nullcontext()

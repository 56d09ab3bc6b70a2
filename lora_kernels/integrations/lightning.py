"""Lightning's callback: Trainer(callbacks=[LoraKernels()])."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the package's older name
    from pytorch_lightning import Callback

from ..adopt import apply


class LoraKernels(Callback):
    """Applies lora_kernels to the module before a strategy wraps it, whatever the stage."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning calls it at the beginning of fit, validate, test and predict."""
        apply(pl_module)

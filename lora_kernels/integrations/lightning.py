"""Lightning's callback: Trainer(callbacks=[LoraKernels()])."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the package's older name
    from pytorch_lightning import Callback

from ..adopt import Patch, patch_peft


class LoraKernels(Callback):
    """Patches PEFT while the trainer runs: the model may be built in any hook of the module."""

    _patch: Patch | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning calls it at the beginning of fit, validate, test and predict."""
        self._patch = patch_peft()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning calls it at the end."""
        if self._patch is not None:
            self._patch.__exit__()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls it instead of teardown where the run breaks off."""
        self.teardown(trainer, pl_module, "")

"""One line for PEFT users: `apply` and `unapply` for a model, `patch_peft` and `unpatch_peft` for
all models of the process, `report` for what is fused and what is not."""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from .injection import check_model
from .linear import LoRALinear


def _peft_linear(op: str) -> Any:
    """`lora_kernels.peft_linear`, which imports PEFT, if PEFT is one that it knows."""
    try:
        module = importlib.import_module(".peft_linear", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "transformers"):
            raise
        raise ImportError(
            f"{op}: {error.name} is not installed; pip install peft, or use LoRALinear without it"
        ) from error
    module.check_version()
    return module


def apply(model: nn.Module) -> nn.Module:
    """Makes every PEFT lora.Linear of `model` a `FusedLoraLinear`; returns the model.

    Parameters, state dict, hooks, saving, merging, hotswap and optimizers stay as they are: the
    layer's class changes, and with it `forward` alone. Call it after get_peft_model or
    PeftModel.from_pretrained, and before fully_shard; adapters added later to the same layers are
    covered, layers that become LoRA layers later need another call. Applying twice is the same as
    once.

    Args:
        model: any module, in place.

    Raises:
        TypeError: not a module.
        ImportError: PEFT is missing, or older than 0.18.

    Warns:
        UserWarning: the model has no lora.Linear; nothing changes.

    Equivalent to::

        for module in model.modules():
            if type(module) is peft.tuners.lora.Linear:
                module.__class__ = FusedLoraLinear
    """
    fused = _peft_linear("lora_kernels.apply")
    layers = [m for m in _modules(model, "apply") if type(m) is fused.lora.Linear]
    for layer in layers:
        layer.__class__ = fused.FusedLoraLinear
    if not layers and not any(isinstance(m, fused.FusedLoraLinear) for m in model.modules()):
        warnings.warn(
            f"lora_kernels.apply: {type(model).__name__} has no peft.tuners.lora.Linear, so "
            "nothing changes; call it after get_peft_model, and see lora_kernels.report(model)",
            stacklevel=2,
        )
    return model


def unapply(model: nn.Module) -> nn.Module:
    """Makes every `FusedLoraLinear` of `model` PEFT's lora.Linear again; returns the model.

    Raises:
        TypeError: not a module.
        RuntimeError: fully_shard has made a class of its own of a layer's.
        ImportError: PEFT is missing, or older than 0.18.
    """
    fused = _peft_linear("lora_kernels.unapply")
    modules = _modules(model, "unapply")
    for module in modules:
        if isinstance(module, fused.FusedLoraLinear) and type(module) is not fused.FusedLoraLinear:
            raise RuntimeError(
                f"lora_kernels.unapply: a layer is {type(module).__name__}, a class that "
                "fully_shard made of FusedLoraLinear; call unapply before it"
            )
    for module in modules:
        if type(module) is fused.FusedLoraLinear:
            module.__class__ = fused.lora.Linear
    return model


class Patch:
    """What `patch_peft` returns: used in a `with`, it unpatches at the end if it has patched."""

    def __init__(self, owner: bool):
        self._owner = owner

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        owner, self._owner = self._owner, False
        if not owner or not _peft_linear("lora_kernels.patch_peft").patched():
            return  # an outer one unpatches, or somebody has
        try:
            unpatch_peft()
        except RuntimeError:
            if kind is None:  # else what went wrong in the body is what matters
                raise


def patch_peft() -> Patch:
    """Fuses every lora.Linear of the process, also of models that a trainer builds later.

    For TRL, transformers' Trainer, axolotl and whatever else calls get_peft_model inside. The gate
    is that of `apply`; so is what falls back. Patching twice is the same as once.

    Returns:
        a context manager, which may be ignored: `with patch_peft(): ...` unpatches at the end,
        unless PEFT was patched before.

    Raises:
        ImportError: PEFT is missing, or older than 0.18.

    Equivalent to::

        peft.tuners.lora.Linear.forward = FusedLoraLinear.forward
    """
    fused = _peft_linear("lora_kernels.patch_peft")
    owner = not fused.patched()
    fused.patch()
    return Patch(owner)


def unpatch_peft() -> None:
    """Undoes `patch_peft`: lora.Linear.forward is PEFT's own again.

    Models of `apply` stay fused.

    Raises:
        RuntimeError: PEFT is not patched, or somebody has replaced the forward since.
        ImportError: PEFT is missing, or older than 0.18.
    """
    _peft_linear("lora_kernels.unpatch_peft").unpatch()


# ---- what is fused -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer: its name in the model, its class, and why it is not fused ("" if it is)."""

    name: str
    kind: str
    why_not: str = ""


@dataclass(frozen=True)
class Report:
    """What `report` found. str() shows it as a table. `note`: why PEFT's layers are left out."""

    layers: tuple[LayerReport, ...]
    note: str = ""

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(not layer.why_not for layer in self.layers)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, force_terminal=False, no_color=True)
        with console.capture() as captured:
            console.print(self._table())
        return captured.get().rstrip()

    def __rich__(self):
        return self._table()

    def _table(self):
        from rich.table import Table

        if not self.layers:
            return self.note or "no LoRA layer: the model has no PEFT adapter and no LoRALinear"
        title = f"{self.fused} of {len(self.layers)} LoRA layers fused"
        table = Table(title=title, title_justify="left")
        table.add_column("layers", justify="right")
        table.add_column("class")
        table.add_column("fused, or why not", max_width=60)
        table.add_column("for example", overflow="fold")
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.why_not), []).append(layer.name)
        for (kind, why_not), names in groups.items():
            table.add_row(str(len(names)), kind, why_not or "fused", names[0])
        return table


def report(model: nn.Module) -> Report:
    """Which LoRA layers of `model` are fused, and why each other is not.

    As far as a layer alone tells: a call may still fall back, for its dtype or its arguments.
    Nothing is changed.

    Returns:
        Report with `layers` (LayerReport: name, kind, why_not) and `fused`; print it for a table.

    Raises:
        TypeError: not a module.
    """
    _modules(model, "report")
    found, note, fused = [], "", None
    if "peft" in sys.modules:  # else the model has none of its layers
        try:
            fused = _peft_linear("lora_kernels.report")
        except ImportError as error:
            note = str(error)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            why_not = "merged: the weight holds it" if module.merged else ""
            found.append(LayerReport(name, "LoRALinear", why_not))
        elif fused is not None and isinstance(module, fused.lora.LoraLayer):
            found.append(LayerReport(name, f"lora.{type(module).__name__}", _why(fused, module)))
    return Report(tuple(found), note)


def _why(fused: Any, module: nn.Module) -> str:
    if not isinstance(module, fused.lora.Linear):
        return f"lora.{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__:
        return "the layer's forward was replaced"
    if type(module).forward is not fused.fused_forward:
        if type(module).forward is not fused.peft_forward():
            return f"lora.{type(module).__name__} has a forward of its own"
        return "not applied: call lora_kernels.apply(model) or patch_peft()"
    needed = fused.operands(module)
    return needed if isinstance(needed, str) else ""


def _modules(model: nn.Module, op: str) -> list[nn.Module]:
    check_model(model, f"lora_kernels.{op}")
    return list(model.modules())

"""LoRALinear in the place of the nn.Linear layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .adapter_config import has_suffix
from .linear import LoRALinear


def inject(
    model: nn.Module,
    *,
    r: int,
    target_modules: Iterable[str],
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> list[str]:
    """Puts a LoRALinear in the place of each nn.Linear that a suffix names; returns their names.

    `target_modules`: literal names or last components of names ("q_proj", "mlp.up_proj"), as PEFT
    matches a list. Weights are shared, not copied. The other arguments are LoRALinear's. No other
    parameter of the model is frozen: `for p in model.parameters(): p.requires_grad_(False)` first.

    Raises:
        TypeError: target_modules is no list of strings, or model no module.
        ValueError: a suffix names nothing, or a layer that is no plain nn.Linear. The model is
            left as it was.
    """
    check_model(model, "inject")
    given: Any = target_modules
    suffixes = list(given) if isinstance(given, Iterable) else [given]
    if isinstance(given, str) or not all(isinstance(suffix, str) for suffix in suffixes):
        raise TypeError(
            f"inject: target_modules must be a list of names, but got {target_modules!r}"
            + (f"; pass [{target_modules!r}]" if isinstance(target_modules, str) else "")
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for suffix in suffixes:
        if not any(has_suffix(name, suffix) for name in modules if name):
            raise ValueError(
                f"inject: target_modules names {suffix!r}, but the model has no such module; "
                "print(model) shows their names"
            )
    names = [n for n in modules if n and any(has_suffix(n, suffix) for suffix in suffixes)]
    for name in names:
        if found := obstacle(modules[name]):
            raise ValueError(
                f"inject: {name} is {found}, expected a plain torch.nn.Linear; name the modules "
                "that are, such as 'layers.0.mlp.up_proj'"
            )
    replace(
        model,
        names,
        lambda name, linear: LoRALinear.from_linear(
            linear, r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
        ),
    )  # fmt: skip
    return names


def check_model(model: nn.Module, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, but got {type(model).__name__}")


def obstacle(module: nn.Module) -> str | None:
    """What keeps a LoRALinear from computing all that this module computes."""
    if type(module) is not nn.Linear:
        return f"{type(module).__module__}.{type(module).__qualname__}"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks) or module._backward_pre_hooks or "forward" in vars(module):
        return "an nn.Linear with hooks or a forward of its own"
    return None


def replace(model: nn.Module, names: list[str], make: Callable[[str, Any], nn.Module]) -> None:
    """model.NAME <- make(NAME, model.NAME), wherever else in the model that module is too.

    Every module is made before the first is put in place.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name in names:
        old = model.get_submodule(name)
        if old not in made:
            made[old] = make(name, old)
    for name, old in list(model.named_modules(remove_duplicate=False)):
        if old in made:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made[old])

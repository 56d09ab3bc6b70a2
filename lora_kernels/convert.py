"""LoRALinear from the layers of PEFT, loralib, torchtune and litgpt, known by their attributes.

A layer that merges q, k and v (loralib.MergedLinear, litgpt.LoRAQKVLinear) has g groups with an
A_i [r, K] and a B_i [N_i, r] each. That is one LoRA of rank r·g:

    A = [A_1; ...; A_g]  [r·g, K]      B [N, r·g] = B_i in the rows of group i and columns of A_i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .injection import check_model, replace
from .linear import LoRALinear

SUPPORTED = (
    "peft.tuners.lora.Linear, loralib.Linear, loralib.MergedLinear, torchtune LoRALinear, "
    "litgpt LoRALinear and LoRAQKVLinear"
)


class _Parts(NamedTuple):
    """What a foreign layer computes, as views of its tensors."""

    weight: Tensor  # [N, K]
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: object  # nn.Dropout, or whatever stands for none


def convert_layer(layer: nn.Module, adapter: str | None = None) -> LoRALinear:
    """A LoRALinear that computes what `layer` computes, with its weight and bias frozen.

    The weight and bias share the layer's memory, lora_a and lora_b are copies. `adapter` names one
    of several adapters of PEFT. A layer with groups becomes a LoRA of rank r·g whose zero blocks
    are exact when it is made, and are trained like the rest when training goes on.

    Raises:
        TypeError: no layer of the libraries in `convert.SUPPORTED`, or one on a quantised weight.
        ValueError: it is merged, disabled or a variant such as DoRA, or `adapter` is needed.
    """
    parts = _parts(layer, adapter)
    if parts is None:
        raise TypeError(f"{_name(layer)} is no LoRA layer known here; expected {SUPPORTED}")
    weight, bias, lora_a, lora_b, scaling, dropout = parts
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise TypeError(
            f"{_name(layer)}: weight is {type(weight).__name__} of {weight.dtype}, expected "
            "a plain floating-point tensor; dequantise it first"
        )
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    made = LoRALinear.from_linear(
        linear.train(layer.training), lora_a.shape[0], adapter_dtype=lora_a.dtype,
        lora_dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )  # fmt: skip
    made.set_adapter(lora_a, lora_b, scaling * lora_a.shape[0])
    made.scaling = scaling
    return made


def convert_model(model: nn.Module, adapter: str | None = None) -> list[str]:
    """`convert_layer` on every layer of `model` that is known here; returns their names.

    Raises:
        TypeError: no module.
        ValueError: none is known, or one cannot be converted. The model is left as it was.
    """
    check_model(model, "convert_model")
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(found + ".") for found in names)
        if name and not inside and _parts(module, adapter) is not None:
            names.append(name)
    if not names:
        raise ValueError(
            f"convert_model: {_name(model)} has no layer known here; expected {SUPPORTED}"
        )
    replace(model, names, lambda name, layer: convert_layer(layer, adapter))
    return names


def _name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _parts(layer: nn.Module, adapter: str | None) -> _Parts | None:
    """The layer's tensors and scaling; None for a layer of another kind."""
    lora_a = getattr(layer, "lora_A", None)
    if isinstance(lora_a, nn.ModuleDict) and hasattr(layer, "base_layer"):
        return _peft(layer, adapter)
    lora_b = getattr(layer, "lora_B", None)
    if isinstance(lora_a, nn.Parameter) and isinstance(lora_b, nn.Parameter):
        return _loralib(layer)
    if isinstance(getattr(layer, "lora_a", None), nn.Linear) and hasattr(layer, "rank"):
        return _torchtune(layer)
    return None


def _peft(layer, adapter: str | None) -> _Parts | None:
    base = layer.base_layer
    transposed = type(base).__name__ == "Conv1D" and hasattr(base, "nf")
    if type(base) is not nn.Linear and not transposed:
        return None
    _refuse(layer, layer.merged, "is merged", "call unmerge()")
    _refuse(layer, layer.disable_adapters, "has its adapters disabled", "enable them")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if adapter is None and len(names) != 1:
        raise ValueError(
            f"{_name(layer)} has the active adapters {names}, expected one; pass adapter=NAME of "
            f"{list(layer.lora_A)}"
        )
    name = names[0] if adapter is None else adapter
    if name not in layer.lora_A:
        raise ValueError(
            f"{_name(layer)} has no adapter {name!r}, expected one of {list(layer.lora_A)}"
        )
    variant = getattr(layer, "lora_variant", {}).get(name)
    merge = "merge it with PEFT's merge_and_unload"
    _refuse(layer, variant is not None, f"computes {type(variant).__name__}", merge)
    a, b = layer.lora_A[name], layer.lora_B[name]
    plain = type(a) is nn.Linear and type(b) is nn.Linear
    _refuse(layer, not plain, f"has adapters of type {type(a).__name__}", merge)
    _refuse(layer, b.bias is not None, "has lora_bias", merge)
    weight = base.weight.t() if transposed else base.weight
    scaling = float(layer.scaling[name])
    return _Parts(weight, base.bias, a.weight, b.weight, scaling, layer.lora_dropout[name])


def _loralib(layer) -> _Parts | None:
    """loralib has the weight on the layer, litgpt in layer.linear."""
    base = getattr(layer, "linear", layer)
    if isinstance(layer, nn.Embedding) or getattr(base, "weight", None) is None:
        return None
    if base.weight.dim() != 2:
        return None
    remedy = "call train() first, which unmerges it" if base is layer else "load it unmerged"
    _refuse(layer, layer.merged, "is merged", remedy)
    weight = base.weight.t() if getattr(layer, "fan_in_fan_out", False) else base.weight
    lora_b: Tensor = layer.lora_B
    if hasattr(layer, "enable_lora"):
        rows = _group_rows(layer, weight.shape[0])
        lora_b = block_diagonal(lora_b, rows, weight.shape[0])
    scaling = float(layer.scaling)
    return _Parts(weight, base.bias, layer.lora_A, lora_b, scaling, layer.lora_dropout)


def _group_rows(layer, n: int) -> list[range]:
    """Rows of the weight that each enabled group owns."""
    if hasattr(layer, "n_query_groups"):  # litgpt: q has a size of its own
        kv = layer.head_size * layer.n_query_groups
        sizes = [layer.head_size * layer.n_head, kv, kv]
    else:
        sizes = [n // len(layer.enable_lora)] * len(layer.enable_lora)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    groups = zip(sizes, ends, layer.enable_lora, strict=True)
    return [range(end - size, end) for size, end, enabled in groups if enabled]


def block_diagonal(lora_b: Tensor, rows: Sequence[range], n: int) -> Tensor:
    """B [n, r·g] of the groups' B_i [N_i, r], stacked in `lora_b`; rows[i] are i's."""
    r = lora_b.shape[1]
    out = lora_b.new_zeros(n, r * len(rows))
    parts = lora_b.detach().split([len(each) for each in rows])
    for i, (part, each) in enumerate(zip(parts, rows, strict=True)):
        out[each.start : each.stop, i * r : (i + 1) * r] = part
    return out


def _torchtune(layer) -> _Parts:
    _refuse(layer, getattr(layer, "merged", False), "is merged", "load it unmerged")
    _refuse(layer, getattr(layer, "disabled", False), "is disabled", "enable it")
    a, b = layer.lora_a.weight, layer.lora_b.weight
    return _Parts(layer.weight, layer.bias, a, b, layer.alpha / layer.rank, layer.dropout)


def _refuse(layer: nn.Module, found: bool, what: str, remedy: str) -> None:
    if found:
        raise ValueError(f"{_name(layer)} {what}, expected plain LoRA; {remedy}")

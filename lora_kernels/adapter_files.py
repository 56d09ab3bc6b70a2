"""Adapters in PEFT's format, adapter_config.json and adapter_model.safetensors, without PEFT.

A file is taken for a stranger's: nothing in it is executed, followed or downloaded, and a model is
touched only when all of it has been checked.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter_config import (
    MAX_CONFIG_BYTES,
    AdapterConfig,
    AdapterError,
    Plain,
    check_config,
    parse_config,
)
from .adapter_tensors import MAX_BYTES, PREFIX, read_tensors, write_tensors
from .injection import check_model, obstacle, replace
from .linear import LoRALinear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Adapter(NamedTuple):
    """An adapter on the CPU: what it computes, and (A [r, K], B [N, r]) of each module."""

    config: AdapterConfig
    tensors: dict[str, tuple[Tensor, Tensor]]


def read_adapter(
    path: str | os.PathLike, *, max_bytes: int = MAX_BYTES, check_finite: bool = True
) -> Adapter:
    """The adapter in the directory `path`. See `load_adapter` for what is refused.

    Raises:
        AdapterError: a file is missing, leads out of the directory, or breaks a rule.
        ImportError: safetensors is not installed.
    """
    root = _directory(path)
    config_file, tensor_file = _inside(root, CONFIG), _inside(root, TENSORS)
    with config_file.open("rb") as stream:
        config = parse_config(stream.read(MAX_CONFIG_BYTES + 1), config_file)
    return Adapter(config, read_tensors(tensor_file, config, max_bytes, check_finite))


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    max_bytes: int = MAX_BYTES,
    check_finite: bool = True,
) -> list[str]:
    """Puts the adapter saved in the directory `path` into the model; returns the modules' names.

    A module that the tensor file names is a LoRALinear, which takes A, B and the scaling and keeps
    its dropout, or an nn.Linear, which becomes a LoRALinear on the same weight with the file's
    dropout. The base weights are never loaded: `model` has them.

    Adapters are float32 on a weight of another dtype than the file's.

    Raises:
        AdapterError: pickle instead of safetensors; a file larger than `max_bytes`; anything in it
            that is not plain LoRA, not finite (`check_finite`) or not the model's; a LoRALinear of
            the model that the file leaves out. The model is left as it was.
        ImportError: safetensors is not installed.
    """
    check_model(model, "load_adapter")
    config, tensors = read_adapter(path, max_bytes=max_bytes, check_finite=check_finite)
    file = Path(path) / TENSORS
    modules = dict(model.named_modules(remove_duplicate=False))
    named: dict[nn.Module, str] = {}
    for name, (a, b) in tensors.items():
        module = _check_module(modules.get(name), name, a, b, check_finite, file)
        if (other := named.setdefault(module, name)) != name:
            got, expected = Plain(f"the module of {other}"), "one adapter a module"
            raise AdapterError(file, name, got, expected, "untie the modules of the model")
    for name, module in modules.items():
        if isinstance(module, LoRALinear) and module not in named:
            remedy = "load the adapter before further layers are injected"
            expected = "its lora_A and lora_B: the model has a LoRALinear there"
            raise AdapterError(file, name, Plain("nothing"), expected, remedy)

    def with_adapter(name: str, linear: nn.Linear) -> LoRALinear:
        a, b = tensors[name]
        return LoRALinear.from_linear(
            linear, config.rank_of(name), lora_dropout=config.lora_dropout,
            adapter_dtype=_adapter_dtype(linear.weight, a, b),
        )  # fmt: skip

    replace(model, [n for n in tensors if not isinstance(modules[n], LoRALinear)], with_adapter)
    for name, (a, b) in tensors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALinear)
        layer.set_adapter(a, b, config.alpha_of(name), config.use_rslora)
    return list(tensors)


def save_adapter(
    model: nn.Module, path: str | os.PathLike, base_model_name_or_path: str | None = None
) -> None:
    """Writes the adapters of the model's LoRALinear layers to the directory `path`, as PEFT does.

    `PeftModel.from_pretrained(base_model, path)` and `load_adapter` read it.

    Raises:
        AdapterError: no LoRALinear in the model, or one that the format cannot hold: rank 0 or
            above 4096, float64, or a dropout unlike the others'.
        ImportError: safetensors is not installed.
    """
    check_model(model, "save_adapter")
    root = Path(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    fields = _fields(layers, root)
    fields["target_modules"], fields["exclude_modules"] = _targets(model, layers, root)
    fields["base_model_name_or_path"] = base_model_name_or_path
    check_config(fields, root / CONFIG)  # what load_adapter refuses is not written
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"  # patterns keep their order
    if root.exists() and not root.is_dir():
        raise AdapterError(root, "", Plain("a file"), "a directory", "give the directory's name")
    root.mkdir(parents=True, exist_ok=True)
    # A reader sees the old files or the new ones, never half of one.
    unfinished = root / (TENSORS + ".unfinished")
    write_tensors(unfinished, {n: (m.lora_a, m.lora_b) for n, m in layers.items()})
    unfinished.replace(root / TENSORS)
    unfinished = root / (CONFIG + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(root / CONFIG)


# ---- paths ---------------------------------------------------------------------------------------


def _directory(path: str | os.PathLike) -> Path:
    given = Path(path)
    if not given.is_dir():
        _refuse_pickle(given)
    try:
        root = given.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        remedy = "download it first: nothing is fetched by name"
        raise AdapterError(given, "", Plain("nothing there"), "a directory", remedy) from None
    if not root.is_dir():
        remedy = f"give the directory that holds {CONFIG} and {TENSORS}"
        raise AdapterError(given, "", Plain("a file"), "a directory", remedy)
    return root


def _refuse_pickle(file: Path) -> None:
    if file.suffix in PICKLES:
        remedy = (
            "unpickling runs the file's code; where you trust it, load it with PEFT and save it "
            "with save_pretrained(safe_serialization=True)"
        )
        raise AdapterError(file, "", Plain("a pickle"), TENSORS, remedy)


def _inside(root: Path, name: str) -> Path:
    """The regular file `name`, which no link leads out of `root`."""
    try:
        file = (root / name).resolve(strict=True)
    except (OSError, RuntimeError):
        if name == TENSORS:
            for other in sorted(root.glob("adapter_model.*")):
                _refuse_pickle(other)
        remedy = "save the adapter with save_pretrained or lora_kernels.save_adapter"
        raise AdapterError(root / name, "", Plain("nothing there"), "a file", remedy) from None
    if not file.is_relative_to(root):
        remedy = "copy the files there (snapshot_download(..., local_dir=...) does)"
        raise AdapterError(
            root / name, "", Plain("a link out of the directory"), "a file in it", remedy
        )
    if not stat.S_ISREG(file.stat().st_mode):
        raise AdapterError(file, "", Plain("no regular file"), "a file", "save the adapter again")
    return file


# ---- into a model --------------------------------------------------------------------------------


def _check_module(
    module: nn.Module | None, name: str, a: Tensor, b: Tensor, check_finite: bool, file: Path
) -> nn.Linear | LoRALinear:
    key = f"{PREFIX}{name}"
    if module is None:
        remedy = "load it into the model that it was trained on; print(model) shows the names"
        raise AdapterError(file, key, Plain("a name"), "a module of the model", remedy)
    if not isinstance(module, LoRALinear) and (found := obstacle(module)):
        expected = "a plain nn.Linear or LoRALinear in the model"
        raise AdapterError(file, key, Plain(found), expected, "load it with PEFT")
    assert isinstance(module, (nn.Linear, LoRALinear))
    (n, k), r = module.weight.shape, a.shape[0]
    if isinstance(module, LoRALinear) and module.r != r:
        remedy = f"build the layer with r={r}, or load into the model without LoRALinear layers"
        raise AdapterError(file, key, Plain(f"r={r}"), f"the layer's r={module.r}", remedy)
    if (b.shape[0], a.shape[1]) != (n, k):
        got = Plain(f"lora_A {list(a.shape)}, lora_B {list(b.shape)}")
        expected = f"[{r}, {k}] and [{n}, {r}] for a weight [{n}, {k}]"
        raise AdapterError(file, key, got, expected, "it was trained on another model")
    if check_finite and isinstance(module, LoRALinear):
        for tensor, held in ((a, module.lora_a), (b, module.lora_b)):
            if tensor.numel() and tensor.abs().max().double() > torch.finfo(held.dtype).max:
                got, expected = Plain("a value beyond its range"), f"{held.dtype}, as the layer's"
                raise AdapterError(file, key, got, expected, "build it with adapter_dtype=float32")
    return module


def _adapter_dtype(weight: Tensor, a: Tensor, b: Tensor) -> torch.dtype:
    same = a.dtype == b.dtype == weight.dtype
    return weight.dtype if same else torch.promote_types(weight.dtype, torch.float32)


# ---- out of a model ------------------------------------------------------------------------------


def _fields(layers: dict[str, LoRALinear], root: Path) -> dict:
    if not layers or "" in layers:
        got = Plain("a LoRALinear alone" if layers else "no LoRALinear")
        remedy = "put it into a model" if layers else "make some with lora_kernels.inject"
        raise AdapterError(root, "", got, "a model with LoRALinear layers", remedy)
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        if layer.lora_dropout != first.lora_dropout:
            expected = f"{first.lora_dropout}, as the first layer's: PEFT's config has one"
            remedy = "set one lora_dropout before saving"
            raise AdapterError(root, f"{name}.lora_dropout", layer.lora_dropout, expected, remedy)
    rslora = all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    return dict(
        peft_type="LORA",
        bias="none",
        inference_mode=True,
        lora_dropout=first.lora_dropout,
        use_rslora=rslora,
        r=first.r,
        lora_alpha=alphas[next(iter(layers))],
        rank_pattern=_pattern(ranks),
        alpha_pattern=_pattern(alphas),
    )


def _alpha(layer: LoRALinear, rslora: bool) -> float:
    """The alpha that gives layer.scaling, which may have been set apart from lora_alpha."""
    if layer.r == 0:
        return 0
    alpha = layer.lora_alpha
    divisor = math.sqrt(layer.r) if rslora else layer.r
    return alpha if alpha / divisor == layer.scaling else layer.scaling * divisor


def _pattern(values: dict) -> dict:
    """Nothing where all are equal, else every module by its whole name.

    PEFT takes a name for a regular expression and the first that matches, and a dot matches any
    character: a name with fewer dots goes first, so each module meets its own name.
    """
    if len(set(values.values())) == 1:
        return {}
    return {f"^{name}": values[name] for name in sorted(values, key=lambda n: n.count("."))}


def _targets(
    model: nn.Module, layers: dict[str, LoRALinear], root: Path
) -> tuple[list[str], list[str] | None]:
    """(target_modules, exclude_modules): last components if they name these layers alone."""
    names = [n for n in dict(model.named_modules()) if n]
    for targets in (sorted({n.rpartition(".")[2] for n in layers}), sorted(layers)):
        config = AdapterConfig(1, 1, target_modules=tuple(targets))
        found = {n for n in names if config.targets(n)}
        if found == set(layers):
            return targets, None
    others = sorted(found - set(layers))
    excluded = AdapterConfig(1, 1, target_modules=tuple(others))
    if wrong := next((n for n in layers if excluded.targets(n)), None):
        remedy = "rename one of the modules"
        got, expected = Plain("a name that ends another module's"), "names that a list tells apart"
        raise AdapterError(root, wrong, got, expected, remedy)
    return targets, others

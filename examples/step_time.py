"""Times training steps of one model with LoRALinear against the same model with an eager LoRA.

The rival is PEFT's own `lora.Linear` where peft is installed, else `EagerLoRALinear` below, which
computes what it computes. Used by finetune_sentiment.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor, nn

import lora_kernels as lk

PEFT_TARGETS = r"encoder\.layer\..*\.(query|key|value|dense)"


class EagerLoRALinear(nn.Module):
    """PEFT's forward: base(x) + B(A(dropout(x))) · scaling, one PyTorch operator after another."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        self.dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / r
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling


@dataclass(frozen=True)
class Comparison:
    """Seconds of every timed step, and the bytes that each side saves for backward."""

    rival: str
    difference: float  # the largest of the two models' logits, same adapters, no dropout
    ours: list[float]
    theirs: list[float]
    ours_saved: int
    theirs_saved: int

    @property
    def ratio(self) -> float:
        return statistics.median(self.theirs) / statistics.median(self.ours)


def attach_rival(encoder: nn.Module, r: int, lora_alpha: float, lora_dropout: float):
    """(encoder with an eager LoRA on the same layers, its name, how to find (A, B) of a layer)."""
    if importlib.util.find_spec("peft") is None:
        for name, module in list(encoder.encoder.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                eager = EagerLoRALinear(module, r, lora_alpha, lora_dropout)
                setattr(encoder.encoder.get_submodule(parent), leaf, eager)

        def find(name: str) -> tuple[Tensor, Tensor]:
            layer = encoder.get_submodule(name)
            return layer.lora_A.weight, layer.lora_B.weight

        return encoder, "eager LoRA", find

    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=PEFT_TARGETS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an old name
        wrapped = peft.get_peft_model(encoder, config)

    def find(name: str) -> tuple[Tensor, Tensor]:
        layer = wrapped.base_model.model.get_submodule(name)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    return wrapped, f"PEFT {peft.__version__}", find


@torch.no_grad()
def copy_adapters(ours: nn.Module, find: Callable[[str], tuple[Tensor, Tensor]]) -> int:
    """Gives the rival our adapters; returns how many layers that were."""
    layers = [(n, m) for n, m in ours.named_modules() if isinstance(m, lk.LoRALinear)]
    for name, layer in layers:
        a, b = find(name)
        a.copy_(layer.lora_a)
        b.copy_(layer.lora_b)
    return len(layers)


def saved_bytes(loss: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps alive between forward and backward, the parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = loss()
    del result
    return sum(kept.values())


def compare(
    model: nn.Module,
    fresh: nn.Module,
    train,
    loss_of: Callable[[nn.Module, object], Tensor],
    args: argparse.Namespace,
    progress: Progress,
) -> Comparison:
    """The same training steps with our layers and with the rival's, from the same adapters.

    Args:
        model: with `encoder` and `head`, tuned; the steps change it.
        fresh: as pretrained; it gets the rival's layers.
        train: has `ids`, `mask`, `labels` and `take(index)`.
        loss_of: (model, batch) -> loss.
    """
    fresh.head.load_state_dict(model.head.state_dict())
    fresh.encoder, name, find = attach_rival(fresh.encoder, args.rank, args.alpha, args.dropout)
    copy_adapters(model.encoder, find)
    models = [model, fresh]
    first = train.take(slice(0, args.batch))
    with torch.no_grad():
        ours, theirs = (m.eval()(first.ids, first.mask) for m in models)

    saved = []
    optimizers = []
    for m in models:
        saved.append(saved_bytes(lambda m=m: loss_of(m.train(), first), list(m.parameters())))
        trainable = [p for p in m.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trainable, lr=1e-4))

    times: tuple[list[float], list[float]] = ([], [])
    warm = 2  # steps that allocate the optimizer's state and fill caches
    task = progress.add_task(f"timing against {name}", total=warm + args.steps_timed)
    for step in range(warm + args.steps_timed):
        start_row = step * args.batch
        batch = train.take(torch.arange(start_row, start_row + args.batch) % len(train.labels))
        for i in (0, 1) if step % 2 == 0 else (1, 0):
            torch.manual_seed(args.seed + step)
            start = time.perf_counter()
            loss_of(models[i], batch).backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            times[i].append(time.perf_counter() - start)
        progress.advance(task)
    difference = (ours - theirs).abs().max().item()
    return Comparison(name, difference, times[0][warm:], times[1][warm:], *saved)

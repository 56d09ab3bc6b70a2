"""What ranks run, and what one process does instead: both sides of tests/test_distributed.py.

Operands are -1, 0 and 1, and dropout keeps an element with probability 1/2, so every sum is exact
in fp32 and in bf16 and a sharded result must have the bits of the whole one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

N, K, R = 9, 13, 3  # odd: two ranks have shards of different size
SCALING, P = 2.0, 0.5
SEED = (2**40 + 7, 11)
NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
BACKENDS = ("cpu", "composed")
NEEDS = ("b", "A", "xB", "xABb")  # the most last: what is cached of a call that asks for less


class Case(NamedTuple):
    """Placements by mesh dimension, written R, P, 0 .. 2 for Shard(d)."""

    x: str
    weight: str
    lead: tuple[int, ...] = (3, 5)
    p: float = 0.0
    wide: bool = False  # bf16 with fp32 adapters
    adapters: str = ""  # placements of lora_a, lora_b and bias; replicated unless said
    seed: tuple[int, ...] = SEED

    def __str__(self) -> str:
        name = f"x{self.x}-w{self.weight}-{'x'.join(map(str, self.lead))}-p{self.p}"
        parts = (name, "wide" if self.wide else "", self.adapters, f"{len(self.seed)}")
        return "-".join(filter(None, parts))


CASES = [
    *(Case(x, w, p=p) for w in "R01" for x in "R012" for p in (0.0, P)),
    *(Case(x, w, p=P, wide=True) for x, w in ("R0", "21", "0R")),
    *(Case(x, w, lead=(5,), p=P) for x, w in ("0R", "R0", "11")),
    Case("1", "R", lead=(1, 6), p=P),
    Case("1", "R", lead=(2, 3, 2), p=P),
    Case("0", "R", lead=(1, 4), p=P),  # the second rank has no row
    Case("P", "0", p=P),
    Case("R", "0", adapters="R00"),
    Case("2", "1", adapters="1RR", p=P),
    Case("2", "1", p=P, seed=(*SEED, 160, 33)),
    Case("1", "R", p=P, seed=(*SEED, 160, 33)),
]
# data x tensor, on four ranks
CASES_2D = [
    *(Case(x, w, lead=(4, 3), p=P) for x, w in (("0R", "R0"), ("02", "R1"), ("0R", "R1"))),
    *(Case(x, w, lead=(3, 5), p=P) for x, w in (("10", "RR"), ("00", "RR"), ("1R", "R0"))),
    *(Case(x, w, lead=(3, 5), p=P) for x, w in (("R2", "01"), ("RR", "00"), ("22", "11"))),
]

# by dimensions of the mesh
DRAWN = {1: Case("2", "1", p=P), 2: Case("02", "R1", p=P)}


def operands(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)

    dtype = torch.bfloat16 if case.wide else torch.float32
    shapes = {"weight": (N, K), "bias": (N,), "x": (*case.lead, K), "dy": (*case.lead, N)}
    found = {name: draw(*shape, dtype=dtype) for name, shape in shapes.items()}
    return {**found, "lora_a": draw(R, K), "lora_b": draw(N, R)}


def results(case: Case, backend: str, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of `tensors`, plain or sharded."""
    leaves = {name: t.detach().requires_grad_(name != "weight") for name, t in tensors.items()}
    y = lk.fused_lora_linear(
        *(leaves[name] for name in NAMES), scaling=SCALING, dropout_p=case.p,
        seed=torch.tensor(case.seed) if case.p else None, backend=backend,
    )  # fmt: skip
    y.backward(dy)
    return {"y": y, **{name: t.grad for name, t in leaves.items() if t.requires_grad}}


def alone(case: Case, backend: str) -> dict[str, Tensor]:
    made = operands(case)
    return results(case, backend, {name: made[name] for name in NAMES}, made["dy"])


# ---- models --------------------------------------------------------------------------------------

WIDTH, BATCH, LENGTH = 16, 4, 6


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype, adapter_dtype: torch.dtype | None, p: float):
        super().__init__()
        options = dict(r=4, lora_alpha=8, lora_dropout=p, dtype=dtype, adapter_dtype=adapter_dtype)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up = lk.LoRALinear(WIDTH, 3 * WIDTH, **options)
        self.down = lk.LoRALinear(3 * WIDTH, WIDTH, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks, adapters drawn at random so that every gradient is there from the first step."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        p: float = 0.0,
        checkpointed: bool = False,
        norms: bool = False,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(Block(dtype, adapter_dtype, p) for _ in range(2))
        if norms:  # trained in the weights' dtype
            for block in self.blocks:
                block.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        for block in self.blocks:
            nn.init.normal_(block.up.lora_b, std=0.3)
            nn.init.normal_(block.down.lora_b, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype)


def loss_of(y: Tensor) -> Tensor:
    return y.float().square().mean()


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name.removeprefix("module."): p.grad for name, p in named if p.requires_grad}


def mean_of_shards(model: nn.Module, world: int, seeded: bool = False) -> dict[str, Tensor]:
    """Gradients of the mean over ranks, one rank after the other; `seeded`: each draws its own."""
    for rank, part in enumerate(batch(model.blocks[0].up.weight.dtype).chunk(world)):
        if seeded:
            torch.manual_seed(100 + rank)
        (loss_of(model(part)) / world).backward()
    return grads_of(model)


BF16 = torch.bfloat16
MIXED = dict(dtype=BF16, adapter_dtype=torch.float32)
FSDP = {
    "fp32": {},
    "each": {},  # every LoRALinear is a group of its own
    "checkpointed": dict(checkpointed=True),
    "dropout": dict(p=0.3, checkpointed=True),
    "mixed": MIXED,
    "mixed_checkpointed": {**MIXED, "p": 0.3, "checkpointed": True},
    "mixed_norms": {**MIXED, "norms": True},  # trained norms in bf16 are a group of their own
    "bf16": {},  # fp32 parameters, gathered and used in bf16
    "mixed_bf16": MIXED,  # fp32 adapters, gathered and used in bf16
}
TP = {
    "replicated": {},
    "dropout": dict(p=0.3),
    "sequence": dict(p=0.3),  # activations between layers are sharded by sequence
    "checkpointed": dict(p=0.3, checkpointed=True),
}


def after_linear() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), lk.LoRALinear(WIDTH, WIDTH, 4))
    nn.init.normal_(model[1].lora_b, std=0.3)
    return model


class Seeded(nn.Module):
    """A layer whose mask the caller fixes, for DDP: a rank's rows are a window of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = lk.LoRALinear(WIDTH, WIDTH, 4)
        nn.init.normal_(self.layer.lora_b, std=0.3)

    def forward(self, x: Tensor, seed: Tensor) -> Tensor:
        layer = self.layer
        return lk.fused_lora_linear(
            x, layer.weight, layer.lora_a, layer.lora_b, layer.bias,
            scaling=layer.scaling, dropout_p=P, seed=seed,
        )  # fmt: skip

"""Trains LoRA adapters of a small language model on several processes: GPUs, or CPU cores here.

    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel ddp
    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel fsdp
    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel tp

The three run the same training: the frozen model, the batches and the dropout masks do not depend
on how the work is divided, so the loss curves agree to rounding, and with those of one process.
NCCL and one GPU a process where there are GPUs, gloo and the CPU elsewhere.

ddp    every rank has the model and a part of the batch; gradients of the adapters are averaged
fsdp   the same, but each rank keeps a part of every block and gathers it when it is needed
tp     every rank has the whole batch and a part of every layer, adapters included

The model predicts the next character of this file and its neighbours. Its layers are
lora_kernels.LoRALinear on random frozen weights; the embedding is frozen too.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.distributed import ColwiseLoRA, RowwiseLoRA

WIDTH, HEADS, LAYERS, RANK, LENGTH = 64, 4, 2, 8, 48
DROPOUT = 0.1


class Layer(lk.LoRALinear):
    """A LoRALinear whose masks come from a seed that the training loop sets.

    Its own draw would do for training. This one gives a rank that has a part of the batch the
    window of the mask that it would have on one process.
    """

    mask_seed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return lk.fused_lora_linear(
            x, self.weight, self.lora_a, self.lora_b, self.bias, scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0, seed=self.mask_seed,
        )  # fmt: skip


def layer(k: int, n: int) -> Layer:
    return Layer(k, n, RANK, lora_alpha=2 * RANK, lora_dropout=DROPOUT, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (layer(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = layer(WIDTH, 4 * WIDTH), layer(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        # Of as many heads as this rank has: all, or its part under tensor parallelism.
        q, k, v = (
            part(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class Model(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH).requires_grad_(False)
        self.places = nn.Embedding(LENGTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = layer(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(F.layer_norm(x, x.shape[-1:]))


def batches(size: int, device: torch.device) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """(vocabulary, endless (tokens, next tokens) [size, LENGTH]), the same on every rank."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([known[c] for c in text])

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        while True:
            starts = torch.randint(len(data) - LENGTH, (size, 1), generator=generator)
            window = data[starts + torch.arange(LENGTH + 1)].to(device)
            yield window[:, :-1], window[:, 1:]

    return len(known), draw()


def parallelize(model: Model, how: str, mesh: DeviceMesh) -> nn.Module:
    if how == "ddp":
        ids = None if mesh.device_type == "cpu" else [torch.cuda.current_device()]
        return DistributedDataParallel(model, device_ids=ids)
    if how == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if HEADS % mesh.size() != 0:
        raise SystemExit(f"--parallel tp: {HEADS} heads cannot be divided by {mesh.size()} ranks")
    split, join = ColwiseLoRA(), RowwiseLoRA()
    plan = {"q": split, "k": split, "v": split, "o": join, "up": split, "down": join}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def set_masks(model: nn.Module, step: int, row: int, device: torch.device) -> None:
    """A mask of its own for every layer and step; `row`: of this rank's part in the batch."""
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    for i, each in enumerate(layers):
        each.mask_seed = torch.tensor([1, step * len(layers) + i, row, 0], device=device)


def train(how: str, steps: int, batch: int, every: int) -> list[float]:
    """The loss of every step: the mean over the whole batch, the same number on every rank."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if batch % world != 0:
        raise SystemExit(f"--batch {batch} cannot be divided by {world} ranks")
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (world,))

    vocabulary, data = batches(batch, device)
    torch.manual_seed(0)
    model = parallelize(Model(vocabulary).to(device), how, mesh)
    part = slice(None) if how == "tp" else slice(rank * batch // world, (rank + 1) * batch // world)
    row = 0 if how == "tp" else part.start * LENGTH
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        tokens, following = next(data)
        set_masks(model, step, row, device)
        logits = model(tokens[part])
        loss = F.cross_entropy(logits.flatten(0, 1), following[part].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
        if rank == 0 and (step % every == 0 or step == steps - 1):
            print(f"step {step:4d}  loss {losses[-1]:.6f}", flush=True)
    if rank == 0:
        kept, total = (sum(count(p, whole) for p in model.parameters()) for whole in (False, True))
        print(f"{how} on {world} x {device.type}: rank 0 keeps {kept:,} of {total:,} parameters")
    dist.barrier()
    time.sleep(0.2)  # gloo's threads need Python to let go of our tensors: later may hang or abort
    dist.destroy_process_group()
    return losses


def count(p: nn.Parameter, whole: bool) -> int:
    return p.to_local().numel() if isinstance(p, DTensor) and not whole else p.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tp"), default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="of all ranks together")
    parser.add_argument("--every", type=int, default=20, help="print one loss in so many steps")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc-per-node 2 examples/train_distributed.py")
    losses = train(args.parallel, args.steps, args.batch, args.every)
    if not losses[-1] < losses[0]:
        raise SystemExit(f"the loss did not fall: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()

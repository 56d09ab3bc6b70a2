"""A small decoder with LoRA on every linear layer, and an artificial language to train it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 16
SUCCESSORS = (0.7, 0.15, 0.1, 0.05)  # probabilities of the tokens that may follow another
CONTENT = 0.5  # size of a token's and of a place's embedding, beside a weight's unit gain
DAMPING = 0.5  # of what a block adds, as in a trained model


class Sizes(NamedTuple):
    layers: int = 2
    width: int = 128
    heads: int = 4
    hidden: int = 384
    vocabulary: int = 64
    batch: int = 8
    length: int = 64


# (x, weight [N, K], lora_a [r, K], lora_b [N, r], seed [2]) -> y: a LoRA layer with dropout
Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Adapted(nn.Module):
    """A frozen random weight of `gain` and its adapter, in float32 whatever the weight's dtype."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, generator: torch.Generator, gain=1.0):
        super().__init__()
        weight = torch.randn(n, k, generator=generator) * gain * k**-0.5
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        bound = k**-0.5  # Kaiming-uniform with a = sqrt(5), as LoRALinear starts
        a = (2 * torch.rand(RANK, k, generator=generator) - 1) * bound
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(torch.zeros(n, RANK))


class Decoder(nn.Module):
    """A causal transformer of which the adapters alone train.

    Args:
        sizes: of everything.
        dtype: of the frozen weights and the activations.
        linear: computes every adapted layer.
        generator: draws the weights, always in the same order.
    """

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, linear: Linear, generator: torch.Generator
    ):
        super().__init__()
        self.sizes, self.linear = sizes, linear
        d, h, v = sizes.width, sizes.hidden, sizes.vocabulary
        table = torch.randn(v + sizes.length, d, generator=generator) * CONTENT
        self.register_buffer("table", table.to(dtype))  # of tokens, then of places
        block = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (h, d), "down": (d, h)}
        shapes = {f"{i}_{name}": nk for i in range(sizes.layers) for name, nk in block.items()}
        shapes["head"] = (v, d)
        self.layers = nn.ModuleDict()
        for name, (n, k) in shapes.items():
            gain = DAMPING if name.endswith(("o", "down")) else 1.0
            self.layers[name] = Adapted(n, k, dtype, generator, gain)

    def forward(self, tokens: Tensor, mask_seed: int, step: int) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; every layer of every step has a mask of its own."""
        counter = step * len(self.layers)
        seeds = {
            name: torch.tensor([mask_seed, counter + i], device=tokens.device)
            for i, name in enumerate(self.layers)
        }

        def apply(name: str, x: Tensor) -> Tensor:
            layer = self.layers[name]
            return self.linear(x, layer.weight, layer.lora_a, layer.lora_b, seeds[name])

        v = self.sizes.vocabulary
        x = self.table[tokens] + self.table[v : v + tokens.shape[1]]
        for i in range(self.sizes.layers):
            normed = F.layer_norm(x, x.shape[-1:])
            q, k, value = (self._heads(apply(f"{i}_{name}", normed)) for name in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, value, is_causal=True)
            x = x + apply(f"{i}_o", mixed.transpose(1, 2).flatten(2))
            x = x + apply(f"{i}_down", F.gelu(apply(f"{i}_up", F.layer_norm(x, x.shape[-1:]))))
        return apply("head", F.layer_norm(x, x.shape[-1:]))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2)

    def adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def sentences(sizes: Sizes, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [B, T + 1] without end; each token is followed by one of its own few successors."""
    v = sizes.vocabulary
    followers = torch.rand(v, v, generator=generator).argsort(1)[:, : len(SUCCESSORS)]
    chance = torch.tensor(SUCCESSORS)
    while True:
        batch = [torch.randint(v, (sizes.batch,), generator=generator)]
        for _ in range(sizes.length):
            drawn = torch.multinomial(chance, sizes.batch, replacement=True, generator=generator)
            batch.append(followers[batch[-1], drawn])
        yield torch.stack(batch, 1)

"""Groups of projections that the tests of grouped calls share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import problems
import tolerance
import torch
from problems import Problem
from torch import Tensor

import lora_kernels as lk

OWN = ("lora_a", "lora_b", "bias")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# name -> M, K and (N, r) of each projection
SHAPES = {
    "one_projection": (20, 24, [(16, 4)]),
    "gate_up": (33, 65, [(47, 7), (47, 7)]),
    "grouped_queries": (101, 96, [(64, 16), (24, 16), (24, 8)]),
    "no_rank_between": (9, 11, [(10, 3), (10, 0), (7, 2)]),
    "ranks_past_panels": (20, 30, [(40, 300), (24, 1), (20, 130)]),
    "vendor_and_own_down_proj": (20, 520, [(24, 16), (24, 2)]),  # either side of `few_rows`
    "blocks_and_tails": (230, 600, [(70, 16), (140, 33)]),  # of 96 rows and of 256 columns
    "vendor_beside_small": (40, 60, [(4, 3), (90, 5), (0, 2)]),
    "no_rows": (0, 12, [(5, 3), (6, 2)]),
    "no_outputs_first": (6, 10, [(0, 3), (5, 2)]),
    "no_inputs": (6, 0, [(4, 2), (3, 1)]),
}


@dataclass(frozen=True)
class Group:
    """Problems that share x and dropout_p."""

    parts: list[Problem]

    def leaves(self) -> tuple[Tensor, list[list[Tensor | None]]]:
        """x and the lists of A, B and bias, all of which require grad."""
        x = self.parts[0].x.detach().clone().requires_grad_()
        lists = [
            [None if t is None else t.detach().clone().requires_grad_() for t in kind]
            for kind in zip(*((p.lora_a, p.lora_b, p.bias) for p in self.parts), strict=True)
        ]
        return x, lists

    def ys(self, backend, x, lists, separate=False, **changes) -> list[Tensor]:
        weights = [p.weight for p in self.parts]
        shared = {"dropout_p": self.parts[0].dropout_p, "backend": backend} | changes
        scalings, seeds = ([getattr(p, n) for p in self.parts] for n in ("scaling", "seed"))
        if self.parts[0].dropout_p == 0 or changes.get("seeds", 0) is None:
            seeds = None
        shared.pop("seeds", None)
        if not separate:
            return lk.fused_lora_linear_group(
                x, weights, *lists, scalings=scalings, seeds=seeds, **shared
            )
        each = zip(weights, *lists, strict=True)
        return [
            lk.fused_lora_linear(x, *o, scaling=s, seed=seeds[i] if seeds else None, **shared)
            for i, (o, s) in enumerate(zip(each, scalings, strict=True))
        ]

    def run(self, backend, separate=False, **changes) -> tuple[list[dict[str, Tensor]], Tensor]:
        """([y and own gradients of each projection], dx)."""
        x, lists = self.leaves()
        ys = self.ys(backend, x, lists, separate, **changes)
        inputs = [x, *(t for kind in lists for t in kind if t is not None)]
        dx, *found = torch.autograd.grad(ys, inputs, [p.dy for p in self.parts])
        grads = iter(found)
        results = [{"y": y.detach()} for y in ys]
        for name, kind in zip(OWN, lists, strict=True):
            for result, t in zip(results, kind, strict=True):
                if t is not None:
                    result[name] = next(grads)
        return results, dx


def make(shape="grouped_queries", dtype=torch.float32, *, p=0.0, lead=None, adapters=()) -> Group:
    """Projections with scalings, seeds and biases of their own; every second has no bias."""
    m, k, sizes = SHAPES[shape] if isinstance(shape, str) else shape
    parts = [
        problems.make(
            (m, n, k, r), dtype, dropout_p=p, lead=lead, scaling=1.7 - i, bias=i % 2 == 0,
            generator_seed=i, adapter_dtype=adapters[i] if adapters else None,
        )
        for i, (n, r) in enumerate(sizes)
    ]  # fmt: skip
    seeds = [torch.tensor([77 + i, i]) if p > 0 else None for i in range(len(parts))]
    return Group([replace(q, x=parts[0].x, seed=s) for q, s in zip(parts, seeds, strict=True)])


def assert_like_separate(
    group: Group, backend: str, eager_like: bool, sum_eager_like: bool | None = None
) -> None:
    got, dx = group.run(backend)
    separate, _ = group.run(backend, separate=True)
    for part, ours, theirs in zip(group.parts, got, separate, strict=True):
        assert torch.equal(ours["y"], theirs["y"])
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            if backend == "cpu":
                assert torch.equal(ours[name], theirs[name]), name
        tolerance.assert_c1(part, ours, eager_like=eager_like)
    # Only the C++ backend rounds the sum once: the reference's calls each round a dx.
    if sum_eager_like is None:
        sum_eager_like = backend != "cpu"
    tolerance.assert_c1_group(group.parts, dx, eager_like=sum_eager_like)

"""What a rank runs of the op itself: on DTensors, bare, its masks, its errors."""

from __future__ import annotations

from collections.abc import Callable

import distributed_cases as cases
import torch
import torch.distributed as dist
from distributed_cases import SEED, Case, P
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import Placement

import lora_kernels as lk
from lora_kernels.distributed import ColwiseLoRA, RowwiseLoRA

Found = dict[str, object]


def placements(text: str) -> list[Placement]:
    known: dict[str, Placement] = {"R": Replicate(), "P": Partial()}
    return [known.get(c) or Shard(int(c)) for c in text]


def sharded(t: Tensor, mesh: DeviceMesh, text: str) -> DTensor:
    if "P" not in text:
        return distribute_tensor(t, mesh, placements(text))
    part = t if dist.get_rank() == 0 else torch.zeros_like(t)
    return DTensor.from_local(part, mesh, placements(text))


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors, also of what FSDP2 shards."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach()
        for name, t in found.items()
    }


def distributed(case: Case, mesh: DeviceMesh) -> dict[str, Tensor]:
    """The case's operands, sharded; a bias has one dimension alone."""
    made = cases.operands(case)
    adapters = case.adapters or "R" * 3
    extra = "" if mesh.ndim == 1 else "R"
    where = {"x": case.x, "weight": case.weight, "dy": "R" * mesh.ndim}
    where |= {n: p + extra for n, p in zip(("lora_a", "lora_b", "bias"), adapters, strict=True)}
    return {name: sharded(t, mesh, where[name]) for name, t in made.items()}


def run_case(case: Case, mesh: DeviceMesh, backend: str) -> Found:
    made = distributed(case, mesh)
    dy = made.pop("dy")
    found = cases.results(case, backend, made, dy)
    leaves = [n for n in found if n in made and "P" not in (case.x if n == "x" else "")]
    kept = all(found[n].placements == made[n].placements for n in leaves)
    return {**whole(found), "kept": kept}


EDGES = {
    "rank 0": dict(lora_a=(0, cases.K), lora_b=(cases.N, 0)),
    "no bias": dict(bias=None),
    "one row": dict(x=(cases.K,)),
    "no row": dict(x=(0, 5, cases.K)),
    "float64": dict(dtype=torch.float64),
}


def edges(mesh: DeviceMesh) -> Found:
    """Calls at the edge of what the op takes, and calls without autograd: whole against sharded."""
    found: Found = {}
    seed = torch.tensor(SEED)

    def call(tensors: list) -> Tensor:
        return lk.fused_lora_linear(*tensors, dropout_p=P, seed=seed)

    usual = dict(x=(3, 5, cases.K), lora_a=(cases.R, cases.K), lora_b=(cases.N, cases.R))
    usual |= dict(weight=(cases.N, cases.K), bias=(cases.N,), dtype=torch.float32)
    for name, changes in EDGES.items():
        made, generator = {**usual, **changes}, torch.Generator().manual_seed(5)
        plain = [
            shape and torch.randint(-1, 2, shape, generator=generator).to(made["dtype"])
            for shape in (made[n] for n in cases.NAMES)
        ]
        for weight in "R01":
            results = []
            for where in ("", weight):
                tensors = [
                    t
                    if t is None or not where
                    else sharded(t, mesh, where if n == "weight" else "R")
                    for n, t in zip(cases.NAMES, plain, strict=True)
                ]
                leaves = [
                    t if t is None else t.detach().requires_grad_(n != "weight")
                    for n, t in zip(cases.NAMES, tensors, strict=True)
                ]
                y = call(leaves)
                y.sum().backward()
                grads = {str(i): t.grad for i, t in enumerate(leaves) if i != 1 and t is not None}
                with torch.no_grad():
                    again = call(leaves)
                results.append(whole({"y": y, "again": again, **grads}))
            alone, got = results
            found[f"{name} {weight}"] = all(torch.equal(alone[n], got[n]) for n in alone)
    return found


def bare(case: Case, mesh: DeviceMesh, needs: str) -> Found:
    """The bare operator; `needs`: the operands that take a gradient, of x, A, B, b for the bias."""
    made = distributed(case, mesh)
    dy = made.pop("dy")
    initials = {"x": "x", "lora_a": "A", "lora_b": "B", "bias": "b"}
    leaves = [made[n].detach().requires_grad_(initials.get(n, "-") in needs) for n in cases.NAMES]
    y = torch.ops.lora_kernels.lora_linear(*leaves, None, cases.SCALING, 0.0, "")[0]
    y.backward(dy)
    grads = {n: t.grad for n, t in zip(cases.NAMES, leaves, strict=True) if t.requires_grad}
    return whole({"y": y, **grads})


# ---- masks and seeds -----------------------------------------------------------------------------


def mask(mesh: DeviceMesh, x: str, weight: str, lead: tuple[int, ...]) -> Tensor:
    """The mask of a sharded call: y = dropout(1) · I · I, and nothing else."""
    ones, eye = torch.ones(*lead, cases.K), torch.eye(cases.K)
    r = "R" * mesh.ndim
    y = lk.fused_lora_linear(
        sharded(ones, mesh, x), sharded(torch.zeros_like(eye), mesh, weight),
        sharded(eye, mesh, r), sharded(eye, mesh, r), dropout_p=P, seed=torch.tensor(SEED),
    )  # fmt: skip
    return y.full_tensor() != 0


def drawn(mesh: DeviceMesh) -> Found:
    """Without a seed, ranks of different generators."""
    torch.manual_seed(20 + dist.get_rank())
    case = cases.DRAWN[mesh.ndim]
    made = distributed(case, mesh)
    y = lk.fused_lora_linear(*(made[n] for n in cases.NAMES), scaling=cases.SCALING, dropout_p=P)
    return {"y": y.full_tensor(), "next": torch.rand(1)}


# ---- errors --------------------------------------------------------------------------------------


def errors(mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    made = distributed(Case("R", "0"), mesh)
    plain = {name: made[name].full_tensor() for name in cases.NAMES}
    other = DeviceMesh("cpu", [1, 0])
    merged = lk.LoRALinear(4, 4, 2)
    merged.merge()

    def call(**changes):
        args = {**made, **changes}
        return lk.fused_lora_linear(*(args[n] for n in cases.NAMES))

    def op(seed: Tensor | None = None, **changes):
        args = {**made, **changes}
        tensors = [args[n] for n in cases.NAMES]
        return torch.ops.lora_kernels.lora_linear(*tensors, seed, 1.0, P, "")

    def group():
        return lk.fused_lora_linear_group(
            made["x"], [made["weight"]], [made["lora_a"]], [made["lora_b"]], scalings=[1.0]
        )

    seed = sharded(torch.tensor(SEED), mesh, "R")
    partial = DTensor.from_local(plain["weight"], mesh, [Partial()])
    return {
        "plain x": lambda: call(x=plain["x"]),
        "plain adapter": lambda: call(lora_a=plain["lora_a"]),
        "plain bias": lambda: call(bias=plain["bias"]),
        "other mesh": lambda: call(lora_b=sharded(plain["lora_b"], other, "R")),
        "partial weight": lambda: call(weight=partial),
        "shape": lambda: call(lora_b=sharded(torch.zeros(cases.N + 1, cases.R), mesh, "R")),
        "bare with dropout": lambda: op(seed),
        "group": group,
        "explain": lambda: lk.explain(*(made[n] for n in cases.NAMES)),
        "plain to sharded": lambda: lk.distributed.sharded_lora_linear(
            *(plain[n] for n in cases.NAMES)
        ),
        "style of a linear": lambda: parallelize_module(nn.Linear(4, 4), mesh, ColwiseLoRA()),
        "style of a merged layer": lambda: parallelize_module(merged, mesh, RowwiseLoRA()),
    }


def errors_2d(mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    made = distributed(Case("0R", "R0"), mesh)
    made["lora_a"] = sharded(made["lora_a"].full_tensor(), mesh["tensor"], "R")
    return {
        "bare": lambda: bare(Case("0R", "R0"), mesh, "x"),
        "style": lambda: ColwiseLoRA()._apply(lk.LoRALinear(4, 4, 2), mesh),
        "part of the mesh": lambda: lk.fused_lora_linear(*(made[n] for n in cases.NAMES)),
    }


def messages(runs: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Each call's error, of which there must be one."""
    found = {}
    for name, run in runs.items():
        try:
            run()
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found

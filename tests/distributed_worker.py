"""The ranks of tests/test_distributed.py: two, then four, run every check and store the results.

python tests/distributed_worker.py FOLDER [PART_OF_A_NAME]
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import distributed_cases as cases
import torch
import torch._dynamo
import torch.distributed as dist
from distributed_cases import SEED, WIDTH, Block, Case, Model, P, Seeded, loss_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.distributed import ColwiseLoRA, RowwiseLoRA

try:
    from peft import LoraConfig, get_peft_model

    PEFT = True
except ImportError:
    PEFT = False
try:
    from accelerate import Accelerator

    ACCELERATE = True
except ImportError:
    ACCELERATE = False

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


# ---- models --------------------------------------------------------------------------------------


def ddp(mesh: DeviceMesh) -> Found:
    model = DistributedDataParallel(Model())
    loss_of(model(part())).backward()
    return whole(cases.grads_of(model))


def ddp_dropout(mesh: DeviceMesh) -> Found:
    model, mine = DistributedDataParallel(Seeded()), part()
    row = dist.get_rank() * mine.shape[0] * mine.shape[1]
    loss_of(model(mine, torch.tensor([*SEED, row, 0]))).backward()
    return whole(cases.grads_of(model))


def part(dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.batch(dtype).chunk(dist.get_world_size())[dist.get_rank()]


def fsdp(name: str, mesh: DeviceMesh) -> Found:
    model = Model(**cases.FSDP[name])
    policy = MixedPrecisionPolicy()
    if name.endswith("bf16"):
        policy = MixedPrecisionPolicy(param_dtype=cases.BF16, reduce_dtype=torch.float32)
    for block in model.blocks:
        for module in (block.norm,) if name == "mixed_norms" else ():
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for module in (block.up, block.down) if name == "each" else ():
            fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for _ in range(2):  # the second step gathers what the first let go
        model.zero_grad()
        torch.manual_seed(100 + dist.get_rank())
        loss_of(model(part(model.blocks[0].up.weight.dtype))).backward()
    dtypes = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    return {**whole(cases.grads_of(model)), "dtypes": dtypes}


def plan(sequence: bool) -> dict[str, object]:
    if sequence:
        between = Shard(1)
        up, down = ColwiseLoRA(input_layouts=between), RowwiseLoRA(output_layouts=between)
    else:
        up, down = ColwiseLoRA(), RowwiseLoRA()
    return {f"blocks.{i}.{n}": s for i in range(2) for n, s in (("up", up), ("down", down))}


def tp(name: str, mesh: DeviceMesh) -> Found:
    model, sequence = Model(**cases.TP[name]), name == "sequence"
    parallelize_module(model, mesh, plan(sequence))
    torch.manual_seed(30 + dist.get_rank())
    x = cases.batch().requires_grad_()
    if sequence:
        local = x.chunk(2, dim=1)[dist.get_rank()]
        y = DTensor.from_local(model(local), mesh, [Shard(1)]).full_tensor()
    else:
        y = model(x)
    loss_of(y).backward()
    dx = x.grad
    if sequence:
        dist.all_reduce(dx)  # each rank has that of its own part
    return {**whole(cases.grads_of(model)), "y": y.detach(), "x": dx}


def tp_merge(mesh: DeviceMesh) -> Found:
    model = Model()
    parallelize_module(model, mesh, plan(False))
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters() if "weight" in n}
    layers = [m for m in model.modules() if isinstance(m, lk.LoRALinear)]
    for layer in layers:
        layer.merge()
    y = model(cases.batch()).detach()
    for layer in layers:
        layer.unmerge()
    after = {n: p.full_tensor() for n, p in model.named_parameters() if "weight" in n}
    return {"y": y, "restored": all(torch.equal(before[n], after[n]) for n in before)}


def tp_compiled(mesh: DeviceMesh) -> Found:
    torch.manual_seed(6)
    block = Block(torch.float32, None, 0.3)
    nn.init.normal_(block.up.lora_b, std=0.3)
    parallelize_module(block, mesh, {"up": ColwiseLoRA(), "down": RowwiseLoRA()})
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = []
    for run in (block, compiled):
        block.zero_grad()
        torch.manual_seed(9 + dist.get_rank())
        y = run(cases.batch())
        loss_of(y).backward()
        found.append({**whole(cases.grads_of(block)), "y": y.detach()})
    eager, got = found
    return {name: bool(torch.allclose(eager[name], got[name], atol=1e-6)) for name in eager}


def tp_autocast(mesh: DeviceMesh) -> Found:
    model = Model()
    parallelize_module(model, mesh, plan(False))
    with torch.autocast("cpu", cases.BF16):
        loss_of(model(cases.batch())).backward()
    return whole(cases.grads_of(model))


def unfinished_input(mesh: DeviceMesh) -> Found:
    """x is the result of a collective that nobody has waited for yet."""
    model, x = cases.after_linear(), cases.batch().requires_grad_()
    before = RowwiseParallel(input_layouts=Replicate(), use_local_output=False)
    parallelize_module(model, mesh, {"0": before, "1": ColwiseLoRA(output_layouts=Replicate())})
    y = model(x)
    loss_of(y).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {**whole(grads), "y": y.detach(), "x": x.grad}


def shared_input(mesh: DeviceMesh) -> Found:
    """Three projections of one DTensor: its gradient stays Partial until they are added up."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.q, self.k, self.v = (lk.LoRALinear(WIDTH, WIDTH, 4) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) + self.v(x)

    model = Attention()
    whole_x, x = (cases.batch().requires_grad_() for _ in range(2))
    loss_of(model(whole_x)).backward()
    parallelize_module(
        model, mesh, {
            "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
            **dict.fromkeys("qkv", ColwiseLoRA(output_layouts=Replicate())),
        },
    )  # fmt: skip
    loss_of(model(x)).backward()
    return {"same": bool(torch.allclose(x.grad, whole_x.grad, atol=1e-6))}


def saved(mesh: DeviceMesh) -> Found:
    """The adapters of an FSDP2 model, gathered as docs/scaling.md says."""
    model = Model(**cases.MIXED)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def accelerated(mesh: DeviceMesh) -> Found:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Model())
    accelerator.backward(loss_of(model(part())))
    return {**whole(cases.grads_of(model)), "kind": type(model).__name__}


def two_dimensions(mesh: DeviceMesh) -> Found:
    """FSDP2 over `data` of what is tensor parallel over `tensor`."""
    model = Model()
    parallelize_module(model, mesh["tensor"], plan(False))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    mine = cases.batch().chunk(2)[mesh.get_local_rank("data")]
    for _ in range(2):
        model.zero_grad()
        loss_of(model(mine)).backward()
    return whole(cases.grads_of(model))


def peft(mesh: DeviceMesh) -> Found:
    """PEFT's own layers, or the fused ones in their place where the package has them."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        linears = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)]
        model = get_peft_model(
            nn.Sequential(nn.Sequential(*linears)),
            LoraConfig(r=4, target_modules=["0.0", "0.2"], init_lora_weights=False),
        )
        model.base_model.model.to(cases.BF16)
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        return model

    found = []
    for shard in (False, True):
        model = make()
        if hasattr(lk, "apply"):
            lk.apply(model)
        if shard:
            fully_shard(model.base_model.model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        loss_of(model(part(cases.BF16))).backward()
        found.append(whole(cases.grads_of(model)))
    own, got = found
    for grad in own.values():
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        grad /= dist.get_world_size()
    off = {name: float((got[name] - g).norm() / g.norm()) for name, g in own.items()}
    return {"off": max(off.values()), "count": len(off)}


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
        "shape": lambda: call(lora_b=sharded(torch.zeros(N_WRONG, cases.R), mesh, "R")),
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


N_WRONG = cases.N + 1


def error_of(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- everything ----------------------------------------------------------------------------------


def checks(mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, run: Callable, *args: object) -> None:
        found[name] = lambda: run(*args)

    two = mesh.ndim == 2
    for case in cases.CASES_2D if two else cases.CASES:
        for backend in cases.BACKENDS:
            add(f"op {case} {backend}", run_case, case, mesh, backend)
        add(f"mask {case}", mask, mesh, case.x, case.weight, case.lead)
    add("drawn", drawn, mesh)
    if two:
        add("two dimensions", two_dimensions, mesh)
        add("errors", lambda: {name: error_of(run) for name, run in errors_2d(mesh).items()})
        return found
    for case in cases.CASES:
        if case.p == 0 and not case.adapters:
            for needs in cases.NEEDS:
                add(f"bare {case} {needs}", bare, case, mesh, needs)
    add("edges", edges, mesh)
    add("ddp", ddp, mesh)
    add("ddp dropout", ddp_dropout, mesh)
    for name in cases.FSDP:
        add(f"fsdp {name}", fsdp, name, mesh)
    for name in cases.TP:
        add(f"tp {name}", tp, name, mesh)
    add("tp merge", tp_merge, mesh)
    add("tp compiled", tp_compiled, mesh)
    add("tp autocast", tp_autocast, mesh)
    add("unfinished input", unfinished_input, mesh)
    add("saved", saved, mesh)
    add("shared input", shared_input, mesh)
    add("errors", lambda: {name: error_of(run) for name, run in errors(mesh).items()})
    if PEFT:
        add("peft", peft, mesh)
    if ACCELERATE:
        add("accelerate", accelerated, mesh)
    return found


def rank_of(folder: Path, world: int, rank: int, only: str) -> None:
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}  # as torchrun sets them
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}  # accelerate looks, nobody connects
    os.environ.update({name: str(value) for name, value in here.items()})
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    shape, names = ((2, 2), ("data", "tensor")) if world == 4 else ((2,), ("tensor",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    found: dict[str, object] = {}
    for name, run in checks(mesh).items():
        if only not in name:
            continue
        try:
            found[name] = run()
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"{world}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, only: str = "") -> int:
    # A fork has imported everything already.
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    failed = 0
    for world in (2, 4):
        ranks = [
            context.Process(target=rank_of, args=(folder, world, rank, only))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            failed |= process.exitcode
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

"""What a rank runs of models: DDP, FSDP2, tensor parallelism, accelerate, PEFT."""

from __future__ import annotations

import distributed_cases as cases
import torch
import torch.distributed as dist
from distributed_cases import SEED, WIDTH, Block, Model, Seeded, loss_of
from distributed_ops import Found, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.distributed import ColwiseLoRA, RowwiseLoRA

try:
    from peft import LoraConfig, get_peft_model

    from lora_kernels import peft_linear

    PEFT = True
except ImportError:
    PEFT = False
try:
    from accelerate import Accelerator

    ACCELERATE = True
except ImportError:
    ACCELERATE = False


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
    """PEFT's layers applied, whole, sharded by block, and each in a group of its own."""
    calls = []
    fused = peft_linear.fused_lora_linear

    def counted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

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

    peft_linear.fused_lora_linear = counted
    found = []
    for groups in ((), ("0",), ("0.0", "0.2")):
        model = lk.apply(make())
        for name in groups:
            fully_shard(model.base_model.model.get_submodule(name), mesh=mesh)
        if groups:
            fully_shard(model, mesh=mesh)
        loss_of(model(part(cases.BF16))).backward()
        found.append(whole(cases.grads_of(model)))
    peft_linear.fused_lora_linear = fused
    own, *sharded = found
    for grad in own.values():
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        grad /= dist.get_world_size()
    off = [(got[n] - g).norm() / g.norm() for got in sharded for n, g in own.items()]
    return {"off": float(max(off)), "count": len(off), "fused": len(calls)}

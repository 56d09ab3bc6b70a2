"""The ranks of tests/test_distributed.py: two, then four, run every check and store the results.

By hand, those checks alone whose names have a part in common:

    python tests/distributed_worker.py FOLDER [PART]
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import distributed_cases as cases
import distributed_models as models
import distributed_ops as ops
import torch
import torch._dynamo  # once, before the ranks are forked
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def checks(mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, run: Callable, *args: object) -> None:
        found[name] = lambda: run(*args)

    two = mesh.ndim == 2
    for case in cases.CASES_2D if two else cases.CASES:
        for backend in cases.BACKENDS:
            add(f"op {case} {backend}", ops.run_case, case, mesh, backend)
        add(f"mask {case}", ops.mask, mesh, case.x, case.weight, case.lead)
    add("drawn", ops.drawn, mesh)
    if two:
        add("two dimensions", models.two_dimensions, mesh)
        add("errors", ops.messages, ops.errors_2d(mesh))
        return found
    for case in cases.CASES:
        if case.p == 0 and not case.adapters:
            for needs in cases.NEEDS:
                add(f"bare {case} {needs}", ops.bare, case, mesh, needs)
    add("edges", ops.edges, mesh)
    add("ddp", models.ddp, mesh)
    add("ddp dropout", models.ddp_dropout, mesh)
    for name in cases.FSDP:
        add(f"fsdp {name}", models.fsdp, name, mesh)
    for name in cases.TP:
        add(f"tp {name}", models.tp, name, mesh)
    add("tp merge", models.tp_merge, mesh)
    add("tp compiled", models.tp_compiled, mesh)
    add("tp autocast", models.tp_autocast, mesh)
    add("unfinished input", models.unfinished_input, mesh)
    add("saved", models.saved, mesh)
    add("shared input", models.shared_input, mesh)
    add("errors", ops.messages, ops.errors(mesh))
    if models.PEFT:
        add("peft", models.peft, mesh)
    if models.ACCELERATE:
        add("accelerate", models.accelerated, mesh)
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

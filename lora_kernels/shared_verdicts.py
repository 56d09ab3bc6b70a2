"""The same verdicts for all ranks: under torch.distributed, choices that differ would differ in
bits.

With more than one process a rank's own verdicts are ignored, unless `share_verdicts` made rank 0's
those of all. A rank's own verdict that a kernel is wrong is never ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from . import dispatch, records, verdicts
from . import machine as machines
from .records import Record


def share_verdicts(group: Any = None, device: torch.device | str | None = None) -> bool:
    """Gives every rank the verdicts of the group's rank 0; of each backend all use it, or none.

    A collective: every rank of the group calls it, before or after its first layer. Each rank
    checks what it received as it would a file: it must be well formed, and backend, device name,
    compute capability, versions and the hash of the kernels' sources must be this rank's own.

    Args:
        group: a process group; None: the default one.
        device: of this rank; None: the current CUDA device, or the CPU where there is none.

    Returns:
        Whether the ranks use all of rank 0's verdicts now, of which there is one at least. If one
        rank cannot, VerdictWarning says on every rank which and why, and the automatic choice of
        that backend is by the shipped table alone.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "share_verdicts: torch.distributed is not initialised; call init_process_group first"
        )
    place = _device(device)
    here = {name: machines.of(place, name) for name in dispatch.MEASURED}
    own = {name: verdicts.load(machine, name) for name, machine in here.items()}
    message: list[Any] = [None]
    if dist.get_rank(group) == 0:
        message = [{n: records.dump(v) if v is not None else why for n, (v, why) in own.items()}]
    root = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(message, src=root, group=group)
    received = {n: _received(message[0], n, here[n], own[n][0]) for n in dispatch.MEASURED}

    objections: list[Any] = [None] * dist.get_world_size(group)
    mine = {name: objection for name, (_, objection) in received.items()}
    dist.all_gather_object(objections, mine, group=group)
    used, all_well = [], True
    for name, (verdict, _) in received.items():
        refused = [f"rank {rank}: {of[name]}" for rank, of in enumerate(objections) if of[name]]
        if refused:
            _warn(name, "; ".join(refused))
            all_well = False
        elif verdict is not None:
            used.append(verdict)
    if all_well and not used:
        _warn("cuda", "rank 0 has nothing to share: it has no verdict")
    dispatch.use_shared(*used)
    return all_well and bool(used)


def _warn(backend: str, why: str) -> None:
    verdicts.warn(
        f"shared {backend} {why}",
        f"no rank uses rank 0's verdict of backend {backend!r}: {why}; the remedy is "
        f"{verdicts.remedy(backend)} on rank 0's machine, with the same versions on all",
    )


def _device(given: torch.device | str | None) -> torch.device:
    if given is not None and torch.device(given) != torch.device("cuda"):
        return torch.device(given)
    if given is None and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _received(
    message: object, backend: str, here: machines.Machine, own: Record | None
) -> tuple[Record | None, str]:
    """(the verdict, "") or (None, why this rank cannot use what came, "" if rank 0 has none)."""
    came = message.get(backend) if isinstance(message, dict) else None
    if isinstance(came, str):
        why = f"rank 0 has nothing to share: {came[: records.MAX_TEXT]}"
        return None, why if came else ""
    try:
        verdict = records.parse(came)
    except ValueError as error:
        return None, f"what came is malformed: {error}"
    if verdict.backend != backend:
        return None, f"what came is of backend {verdict.backend!r}"
    if differ := machines.differences(verdict.machine, here):
        return None, f"what came is of {'; '.join(differ)}"
    if own is not None and own.backend == backend and (wrong := own.wrong()):
        return None, f"a kernel is wrong here: {', '.join(wrong)}"
    return verdict, ""

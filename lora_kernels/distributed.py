"""One verdict for all ranks: under torch.distributed, choices that differ would differ in bits.

With more than one process a rank's own verdict is ignored, unless `share_verdicts` made rank 0's
that of all. A rank's own verdict that a kernel is wrong is never ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from . import dispatch, records, verdicts
from . import machine as machines
from .records import Record


def share_verdicts(group: Any = None, device: torch.device | str | None = None) -> bool:
    """Gives every rank the verdict of the group's rank 0; all use it, or none does.

    A collective: every rank of the group calls it, before or after its first layer. Each rank
    checks what it received as it would a file: it must be well formed, and device name, compute
    capability, versions and the hash of the kernels' sources must be this rank's own.

    Args:
        group: a process group; None: the default one.
        device: of this rank; None: the current CUDA device, or the CPU where there is none.

    Returns:
        Whether the ranks use rank 0's verdict now. If one cannot, VerdictWarning says on every rank
        which and why, and the automatic choice is by the shipped table alone.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "share_verdicts: torch.distributed is not initialised; call init_process_group first"
        )
    here = machines.of(_device(device))
    own, why = verdicts.load(here)
    message: list[Any] = [None]
    if dist.get_rank(group) == 0:
        message = [records.dump(own) if own is not None else why or "it has no verdict"]
    root = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(message, src=root, group=group)
    verdict, objection = _received(message[0], here, own)

    objections: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(objections, objection, group=group)
    refused = [f"rank {rank}: {text}" for rank, text in enumerate(objections) if text]
    dispatch.use_shared(None if refused else verdict)
    if refused:
        verdicts.warn(
            f"shared {refused}",
            f"no rank uses rank 0's verdict: {'; '.join(refused)}; the remedy is "
            f"{verdicts.REMEDY} on rank 0's machine, with the same versions on all",
        )
    return not refused


def _device(given: torch.device | str | None) -> torch.device:
    if given is not None and torch.device(given) != torch.device("cuda"):
        return torch.device(given)
    if given is None and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _received(
    message: object, here: machines.Machine, own: Record | None
) -> tuple[Record | None, str]:
    """(the verdict, "") or (None, why this rank cannot use what came)."""
    if isinstance(message, str):
        return None, f"rank 0 has nothing to share: {message[: records.MAX_TEXT]}"
    try:
        verdict = records.parse(message)
    except ValueError as error:
        return None, f"what came is malformed: {error}"
    if differ := machines.differences(verdict.machine, here):
        return None, f"what came is of {'; '.join(differ)}"
    if own is not None and (wrong := own.wrong()):
        return None, f"a kernel is wrong here: {', '.join(wrong)}"
    return verdict, ""

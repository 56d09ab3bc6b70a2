"""`fused_lora_linear` of DTensors: each rank runs the op on its own shards.

The placements follow `sharding_rules`, one rule a mesh dimension, so any combination works on a
mesh of any number of dimensions. With dropout the ranks agree on one seed, and each takes the
window of the mask that its shard of x is: together they draw the mask of the whole matrix, bit for
bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives  # torch.compile traces these
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from . import checks, dropout
from .functional import fused_lora_linear
from .sharding_rules import rules_of

OP = "fused_lora_linear"


def sharded_lora_linear(
    x: DTensor,  # [..., K]
    weight: DTensor,  # [N, K]
    lora_a: DTensor,  # [r, K]
    lora_b: DTensor,  # [N, r]
    bias: DTensor | None = None,  # [N]
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> DTensor:
    """`fused_lora_linear` of DTensors on one mesh, which calls it: the arguments are the same.

    Operands whose placements are not those of the rule (`sharding_rules`) are redistributed, as
    DTensor's own operators do; a leaf's gradient comes back in the leaf's placements.

    Args:
        seed: the same on every rank, plain or a DTensor. None draws one on the mesh's first rank
            and broadcasts it if dropout_p > 0; every rank's generator advances alike.

    Returns:
        [..., N]: sharded on its last dimension where weight's rows are sharded, Partial where its
        columns are, sharded like x where x's rows are.

    Raises:
        TypeError: some of the tensors are DTensors and some are not.
        ValueError: they are on different meshes, or as `fused_lora_linear`.
        NotImplementedError: a placement without a rule, such as a Partial weight.

    With dropout, a shard whose rows are not neighbours in the flattened matrix (a sequence shard of
    [B, S, K]) takes one call of the op for each run of rows that are: B calls.
    """
    checks.validate(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, sharded=True)
    if not isinstance(x, DTensor):
        raise TypeError(f"{OP}: sharded_lora_linear takes DTensors; call fused_lora_linear")
    return run(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)


def run(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend) -> DTensor:
    """`sharded_lora_linear` of a call that `checks.validate` let through."""
    mesh = _mesh_of(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)
    rules = rules_of(x.placements, weight.placements, x.dim())
    placed = [r.x for r in rules]
    operands: list[Any] = [
        _local(weight, [r.weight for r in rules]),
        _local(lora_a, [r.lora_a for r in rules], [r.da for r in rules]),
        _local(lora_b, [r.lora_b for r in rules], [r.db for r in rules]),
    ]
    if bias is not None:
        once = [isinstance(r.bias, Partial) for r in rules]
        wanted = [Replicate() if o else r.bias for o, r in zip(once, rules, strict=True)]
        local = _local(bias, wanted, [r.dbias for r in rules])
        operands.append(_Once.apply(local, _first(mesh, once)) if any(once) else local)
    local_x = _local(x, placed, [r.dx for r in rules])

    def call(part: Tensor, window: Tensor | None) -> Tensor:
        return fused_lora_linear(
            part, *operands, scaling=scaling, dropout_p=dropout_p, seed=window, backend=backend
        )

    if dropout.drops(dropout_p):
        seed = _agreed(seed, mesh, local_x.device)
        y = _by_windows(call, local_x, x.shape, mesh, placed, seed)
    else:
        y = call(local_x, None)
    shape = torch.Size([*x.shape[:-1], weight.shape[0]])
    stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return DTensor.from_local(
        y, mesh, [r.y for r in rules], run_check=False, shape=shape, stride=stride
    )


def _mesh_of(**tensors: Any) -> DeviceMesh:
    mesh = tensors["x"].device_mesh
    for name, t in tensors.items():
        if t is not None and t.device_mesh != mesh:
            raise ValueError(
                f"{OP}: all DTensors must be on one mesh; x is on {mesh} but {name} is on "
                f"{t.device_mesh}; distribute {name} over x's mesh"
            )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{OP}: this rank is not in {mesh}, so it has no shard to work on")
    return mesh


def _local(
    t: DTensor, placements: Sequence[Placement], grad: Sequence[Placement] | None = None
) -> Tensor:
    """This rank's part of `t` in `placements`; its gradient is in the placements `grad`."""
    # A redistribution also brings a leaf's gradient to the leaf's placements. That of another
    # tensor may stay Partial until it is added to others.
    wanted = t.requires_grad and t.is_leaf and tuple(grad or ()) != t.placements
    if wanted or tuple(placements) != t.placements:
        t = t.redistribute(placements=placements)
    return t.to_local(grad_placements=grad)


def _first(mesh: DeviceMesh, dims: Sequence[bool]) -> bool:
    """Whether this rank is the first along each of these mesh dimensions."""
    coordinate = mesh.get_coordinate() or ()
    return not any(c for c, counts in zip(coordinate, dims, strict=True) if counts)


class _Once(torch.autograd.Function):
    """The bias on one rank and zero on the others, with the gradient of the bias on all."""

    @staticmethod
    def forward(ctx, bias, here):
        return bias.view_as(bias) if here else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx, dbias):
        return dbias, None


# ---- the mask ------------------------------------------------------------------------------------


def _agreed(seed: Tensor | None, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """The seed of all ranks of the mesh: the caller's, or the first rank's."""
    if isinstance(seed, DTensor):
        return seed.full_tensor()
    if seed is not None:
        return seed
    drawn = dropout.draw_seed(device)  # on every rank, so that their generators stay together
    for dim in range(mesh.ndim):
        drawn = collectives.wait_tensor(collectives.broadcast(drawn, 0, (mesh, dim)))
    return drawn


def _by_windows(
    call: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    seed: Tensor,
) -> Tensor:
    """`call` on each part of local x that is one window of the flattened matrix of `shape`."""
    offset = _offset(shape, mesh, placements)
    split = [d for d in range(x.dim() - 1) if x.shape[d] != shape[d]]
    runs = x.shape[: split[-1]] if split else x.shape[:0]  # the dimensions before the last split
    if runs.numel() <= 1:
        return call(x, _window(seed, _row(shape, offset), offset[-1]))
    parts = []
    for index in itertools.product(*map(range, runs)):
        start = [o + i for o, i in itertools.zip_longest(offset, index, fillvalue=0)]
        parts.append(call(x[index], _window(seed, _row(shape, start), offset[-1])))
    return torch.stack(parts).unflatten(0, runs)


def _offset(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]) -> list[int]:
    """Where in a tensor of `shape` this rank's shard begins: DTensor splits as torch.chunk does."""
    size, offset = list(shape), [0] * len(shape)
    coordinate = mesh.get_coordinate() or ()
    for ranks, mine, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if placement.is_shard():
            d = placement.dim
            chunk = -(-size[d] // ranks)
            start = min(mine * chunk, size[d])
            offset[d] += start
            size[d] = min(chunk, size[d] - start)
    return offset


def _row(shape: Sequence[int], index: Sequence[int]) -> int:
    """The row of the flattened matrix at which `index` of [..., K] lies."""
    row = 0
    for size, i in zip(shape[:-1], index[:-1], strict=True):
        row = row * size + i
    return row


def _window(seed: Tensor, row: int, col: int) -> Tensor:
    """`seed` with its window moved by (row, col), without a copy from the host."""
    if row == 0 and col == 0:
        return seed
    moved = torch.nn.functional.pad(seed, (0, 4 - seed.shape[0]))
    moved[2] += row
    moved[3] += col
    return moved

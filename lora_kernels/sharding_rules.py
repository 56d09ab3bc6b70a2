"""How the op is sharded along one dimension of a device mesh.

R is Replicate, S(d) Shard(d), P Partial; weight [N, K] and x [..., K] decide:

    rule       weight  x      lora_a  lora_b  bias   y      h  dx     dA    dB    dbias
    column     S(0)    R      R       S(0)    S(0)   S(-1)  R  P      P     S(0)  S(0)
    row        S(1)    S(-1)  S(1)    R       once   P      P  S(-1)  S(1)  P     R
    rows of x  R       S(d)   R       R       R      S(d)   -  S(d)   P     P     P
    replicate  R       R      R       R       R      R      R  R      R     R     R

Each row is exact because every result is a sum over what the rule splits. `once`: the bias is added
on one rank. h belongs to a rank's own rows of x, in that rank's order: for d > 0 they are not
neighbours in the flattened matrix, so h is handed on to backward where it is and never moved. That
is why the rule is a function of the placements of x and weight alone, and not the cheapest of
several.

The bare operators have these rules without dropout: a mask needs the rank's place in the matrix,
which a sharding rule cannot give. `sharded` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ._ops import ops

_REMEDY = (
    "call lora_kernels.fused_lora_linear with the DTensors, which runs the op on each rank's "
    "shards (lora_kernels.distributed.sharded_lora_linear)"
)


class Rule(NamedTuple):
    """Placements along one mesh dimension: operands, results, gradients."""

    x: Placement
    weight: Placement
    lora_a: Placement
    lora_b: Placement
    bias: Placement  # Partial: the bias is added on one rank
    y: Placement
    h: Placement
    dx: Placement
    da: Placement
    db: Placement
    dbias: Placement


def rule_of(x: Placement, weight: Placement, dims: int) -> Rule:
    """The rule for these placements of weight and of x, which has `dims` dimensions.

    x may have any placement where weight is sharded: it is brought to the rule's.

    Raises:
        NotImplementedError: a placement that is none of Replicate, Shard and, for x, Partial.
    """
    r, p, last = Replicate(), Partial(), Shard(dims - 1)
    if not (weight.is_replicate() or _is_shard(weight)):
        raise NotImplementedError(_no_rule("weight", weight, "Replicate and Shard"))
    if not (x.is_replicate() or _is_shard(x) or x.is_partial()):
        raise NotImplementedError(_no_rule("x", x, "Replicate, Shard and Partial"))
    if weight == Shard(0):
        return Rule(r, weight, r, weight, weight, last, r, p, p, weight, weight)
    if weight == Shard(1) or x == last:
        s = Shard(1)
        return Rule(last, s, s, r, p, p, p, last, s, p, r)
    if _is_shard(x):
        return Rule(x, r, r, r, r, x, Shard(0), x, p, p, p)
    return Rule(r, r, r, r, r, r, r, r, r, r, r)


def _is_shard(placement: Placement) -> bool:
    """Whether it is Shard; a strided one is no window of the matrix."""
    return placement.is_shard() and not hasattr(placement, "split_factor")


def _no_rule(name: str, placement: Placement, known: str) -> str:
    return (
        f"fused_lora_linear: {name} has placement {placement}, but there are sharding rules for "
        f"{known} alone; redistribute {name} first"
    )


# ---- the bare operators --------------------------------------------------------------------------


@functools.cache
def register() -> None:
    """Gives lora_linear and lora_linear_backward their rules; once a process."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(ops.lora_linear.default)(_forward)
    register_sharding(ops.lora_linear_backward.default)(_backward)
    # DTensor caches a result by tensors and ints alone, but which gradients are asked for decides
    # the shapes of what backward returns.
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    backend = [a.name for a in ops.lora_linear_backward.default._schema.arguments].index("backend")
    known[ops.lora_linear_backward.default] = RuntimeSchemaInfo(backend, needs_pytree=True)


Placements = list[Placement | None]  # None: not a tensor
Sharding = list[tuple[Placements, Placements]]  # of results and of operands


def _forward(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p, backend) -> Sharding:
    rule = _single(x, weight, seed, "lora_linear")
    added = None if bias is None else rule.bias
    operands = [rule.x, rule.weight, rule.lora_a, rule.lora_b, added, None, None, None, None]
    return [([rule.y, rule.h], operands)]


def _backward(
    dy, x, weight, lora_a, lora_b, h, seed, scaling, dropout_p, backend, *needs
) -> Sharding:
    rule = _single(x, weight, seed, "lora_linear_backward")
    # What is not needed is a tensor of no elements.
    grads = zip((rule.dx, rule.da, rule.db, rule.dbias), needs, strict=True)
    results: Placements = [placement if needed else Replicate() for placement, needed in grads]
    dy_placement = Replicate() if isinstance(rule.y, Partial) else rule.y
    operands = [dy_placement, rule.x, rule.weight, rule.lora_a, rule.lora_b, rule.h]
    return [(results, [*operands, *[None] * (4 + len(needs))])]


def _single(x: Any, weight: Any, seed: object, op: str) -> Rule:
    """The rule of all mesh dimensions: DTensor would mix those that differ, and move h."""
    if seed is not None:
        raise NotImplementedError(
            f"{op}: its sharding rule does not serve dropout, because the mask depends on each "
            f"rank's place in x; {_REMEDY}"
        )
    rules = rules_of(x.placements, weight.placements, x.ndim)
    if len(set(rules)) > 1:
        raise NotImplementedError(
            f"{op}: its sharding rule serves a mesh of one dimension, or of several that are used "
            f"alike, but got x {x.placements} and weight {weight.placements}; {_REMEDY}"
        )
    return rules[0]


def rules_of(x: Sequence[Placement], weight: Sequence[Placement], dims: int) -> list[Rule]:
    """One rule a mesh dimension, from all placements of x and of weight."""
    return [rule_of(p_x, p_w, dims) for p_x, p_w in zip(x, weight, strict=True)]

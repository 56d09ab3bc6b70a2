"""Every bad argument of a grouped call has its message; sequences of any kind are taken."""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk

OPS = torch.ops.lora_kernels


def call(**changes):
    args = dict(
        x=torch.randn(5, 8), weights=[torch.randn(6, 8), torch.randn(4, 8)],
        lora_as=[torch.randn(3, 8), torch.randn(2, 8)],
        lora_bs=[torch.randn(6, 3), torch.randn(4, 2)],
    )  # fmt: skip
    return lk.fused_lora_linear_group(**(args | {"scalings": 1.0} | changes))


WEIGHT = torch.randn(6, 8)
BAD = {
    "empty": (dict(weights=[]), ValueError, "weights must hold one tensor a projection, but is"),
    "a_tensor": (dict(weights=WEIGHT), TypeError, "weights must be a sequence .* got Tensor; put"),
    "not_a_sequence": (dict(seeds=3), TypeError, "seeds must be a sequence .* but got int"),
    "fewer_as": (dict(lora_as=[WEIGHT]), ValueError, "lora_as must have .* 2 weights, but has 1"),
    "more_biases": (dict(biases=[None] * 3), ValueError, "biases must have .* but has 3"),
    "fewer_scalings": (dict(scalings=[1.0]), ValueError, "scalings must have .* but has 1"),
    "fewer_seeds": (dict(seeds=[]), ValueError, "seeds must have .* but has 0"),
    "none_for_a_tensor": (
        dict(weights=[WEIGHT, None]), TypeError, "projection 1: weight must be a Tensor"
    ),
    "shape": (
        dict(weights=[WEIGHT, torch.randn(4, 9)]), ValueError,
        r"projection 1: x.size\(-1\) = 8 must equal weight.size\(1\) = 9",
    ),
    "dtype": (
        dict(weights=[WEIGHT.bfloat16(), WEIGHT[:4]]), ValueError,
        "projection 0: weight must have x's dtype torch.float32, but got torch.bfloat16",
    ),
    "tensor_scaling": (
        dict(scalings=torch.ones(2)), TypeError, "projection 0: scaling must be a number"
    ),
    "nan_scaling": (
        dict(scalings=[1.0, float("nan")]), ValueError, "projection 1: scaling must be finite"
    ),
    "probability": (dict(dropout_p=1.5), ValueError, "between 0 and 1, but got 1.5"),
    "probabilities": (dict(dropout_p=[0.1, 0.1]), TypeError, "dropout_p must be a number"),
    "seed": (
        dict(dropout_p=0.1, seeds=[torch.zeros(2, dtype=torch.int64), torch.zeros(2)]), ValueError,
        "projection 1: seed must be an int64 tensor",
    ),
    "trained_weight": (
        dict(weights=[WEIGHT, torch.randn(4, 8, requires_grad=True)]), RuntimeError,
        "projection 1: weight requires grad, but this op treats it as frozen",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"^fused_lora_linear_group: .*{message}"):
        call(**changes)


def test_sequences_of_any_kind():
    layers = [lk.LoRALinear(8, n, 3) for n in (6, 4)]
    kinds = (tuple, list, torch.nn.ParameterList)
    weights, lora_as, lora_bs = (
        kind(getattr(m, name) for m in layers)
        for kind, name in zip(kinds, ("weight", "lora_a", "lora_b"), strict=True)
    )
    x = torch.randn(5, 8)
    ys = lk.fused_lora_linear_group(x, weights, lora_as, lora_bs, scalings=1.0)
    assert [tuple(y.shape) for y in ys] == [(5, 6), (5, 4)]


def test_direct_calls_of_the_ops_do_not_crash():
    """Lists of different lengths, and rows that do not fit: a message, not a wild read."""
    x, w, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
    with pytest.raises(RuntimeError, match="every list must have one entry a projection"):
        OPS.forward_group(x, [w, w], [a], [b, b], [None] * 2, [None] * 2, 0, [1.0] * 2, [1.0] * 2)
    with pytest.raises(RuntimeError, match="every list must have one entry a projection"):
        OPS.forward_group(x, [], [], [], [], [], 0, [], [])
    flags = ([False] * 2, [False] * 2, True, [True] * 2, [True] * 2, [True] * 2)
    rest = ([w, w], [a, a], [b, b], [torch.randn(5, 3)] * 2, [None] * 2, 0, [1.0] * 2, [1.0] * 2)
    with pytest.raises(RuntimeError, match="backward_group: the number of rows of dy is 4"):
        needs = (*flags[:3], *([[False] * 2] * 3))
        OPS.backward_group(x, [torch.randn(5, 6), torch.randn(4, 6)], *rest, *needs)
    with pytest.raises(RuntimeError, match=r"weight_grad: h\.size"):
        OPS.backward_group(x[:3], [torch.randn(5, 6)] * 2, *rest, *flags)

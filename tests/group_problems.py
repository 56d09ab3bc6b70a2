"""The problems that planted bugs of groups have to fail, as in mutation_problems.py."""

from __future__ import annotations

import json

import numpy as np
import torch
from emulator.suite import bf16
from mutation_problems import exact, ternary, value_of

from lora_kernels import dropout

# (M, K), (N, r, own options) of each projection, options of the call, and what it launches; `turns`
# is in how many timings it runs. Some have no mask, no rank or no bias, and most scales differ.
# Together: several tiles of rows, of columns and of a cluster; odd ranks, whose h is copied out; no
# columns; operands that are copied, one weight that decides how all lie; an h made by itself;
# copies for a GEMM that has no h to wait for.
FORWARD_GROUPS = [
    (
        (270, 72),
        [
            (136, 16, dict(seed=[5, 6], threshold=4000, bias=True)),
            (40, 7, dict(scale=(2.0, 4.0))),
            (24, 0, dict(bias=True)),
        ],
        dict(multiprocessors=4, turns=1),
        ["pack", "down_proj_sm90", "fused_gemm_sm90", "pack"],
    ),
    (
        (70, 136),
        [
            (40, 5, dict(scale=(2.0, 4.0), bias=True)),
            (200, 3, dict(scale=(2.0, 2.0))),
            (24, 72, dict(scale=(4.0, 1.0), bias=True)),
        ],
        dict(multiprocessors=2, transposed=["x", "weight1", "a2"], turns=2),
        ["pack", "down_proj_sm90", "fused_gemm_sm90", "pack"],
    ),
    (
        (72, 136),
        [
            (0, 16, dict(seed=[5, 6], threshold=4000)),
            (72, 136, dict(seed=[5, 7], threshold=4000)),
            (24, 8, dict(seed=[5, 8], threshold=9000)),
            (40, 24, {}),
        ],
        dict(multiprocessors=4, transposed=["a3"], turns=3),
        ["pack", "down_proj_sm80", "down_proj_sm90", "fused_gemm_sm90"],
    ),
    (
        (20, 136),
        [(41, 0, dict(bias=True)), (72, 16, {})],
        dict(multiprocessors=2, transposed=["weight0"], turns=3),
        ["pack", "fused_gemm_sm90", "decode"],
    ),
]
# Together: dx masked and not, in several tiles of rows and of columns; odd ranks, which leave gaps
# between the dh; every way to make dh; dA of all, of some, without dx; operands that are copied.
BACKWARD_GROUPS = [
    (
        (270, 72),
        [
            (72, 16, dict(seed=[5, 6], threshold=4000)),
            (24, 0, dict(wanted=["dbias"])),
            (40, 72, dict(seed=[5, 7], threshold=9000, scale=(4.0, 2.0), wanted=["da"])),
        ],
        dict(multiprocessors=4, turns=1),
        ["weight_grad_sm90", "weight_grad_sm90", "reduce", "down_proj_sm90", "fused_gemm_sm90",
         "weight_grad_sm90", "weight_grad_sm90", "reduce"],
    ),
    (
        (20, 264),
        [
            (40, 16, dict(scale=(2.0, 4.0))),
            (72, 3, dict(seed=[5, 6], threshold=9000, scale=(2.0, 2.0), wanted=["da"])),
            (24, 72, dict(seed=[5, 7], threshold=4000, scale=(4.0, 1.0), wanted=["db"])),
        ],
        dict(multiprocessors=2, turns=2),
        ["zero", "weight_grad_sm90", "weight_grad_sm90", "reduce", "down_proj_sm80",
         "fused_gemm_sm90", "weight_grad_sm90", "reduce"],
    ),
    (
        (20, 67),
        [
            (72, 24, {}),
            (41, 7, dict(scale=(2.0, 4.0), wanted=["da", "db", "dbias"])),
        ],
        dict(multiprocessors=2, turns=2),
        ["pack", "zero", "weight_grad_sm90", "weight_grad_sm90", "reduce", "fused_gemm_sm90",
         "weight_grad_sm90", "reduce"],
    ),
    (
        (40, 72),
        [
            (72, 8, dict(wanted=["db"])),
            (40, 5, dict(seed=[5, 6], threshold=4000, wanted=["da"])),
            (24, 16, dict(wanted=["da"])),
        ],
        dict(multiprocessors=2, dx=False),
        ["zero", "weight_grad_sm90", "down_proj_sm80", "down_proj_sm90", "weight_grad_sm90",
         "reduce"],
    ),
]  # fmt: skip


def group_inputs(shape, projections, g: np.random.Generator):
    """(x, then of each projection weight, A, B, its mask and its options)."""
    m, k = shape
    x, found = ternary(g, m, k, keep=min(k // 4, 30)), []
    for n, r, own in projections:
        own = dict(scale=(2.0, 1.0)) | own
        kept = np.ones((m, k), bool)
        if "seed" in own:
            kept = dropout.reference_mask(torch.tensor(own["seed"]), m, k, own["threshold"]).numpy()
        weight, a = (ternary(g, rows, k, keep=min(k // 4, 30)) for rows in (n, r))
        found.append((weight, a, ternary(g, n, r, keep=4), kept, own))
    return x, found


def forward_group_problem(shape, projections, options, kernels) -> dict[str, np.ndarray]:
    g = np.random.default_rng(sum(shape))
    x, each = group_inputs(shape, projections, g)
    found, given = {"x": bf16(x)}, []
    for i, (weight, a, b, kept, own) in enumerate(each):
        h_scale, up = own["scale"]
        h = h_scale * (x * kept) @ a.T
        y = x @ weight.T + up * h @ b.T
        if own.pop("bias", False):
            bias = g.integers(-8, 9, len(weight))
            y, found[f"bias{i}"] = y + bias, bf16(bias)
        given.append(own)
        arrays = dict(weight=bf16(weight), a=bf16(a), b=bf16(b), y=exact(y), h=exact(h))
        found |= {f"{name}{i}": array for name, array in arrays.items()}
    return found | {"options": np.array(json.dumps(options | dict(each=given, kernels=kernels)))}


def backward_group_problem(shape, projections, options, kernels) -> dict[str, np.ndarray]:
    g = np.random.default_rng(sum(shape))
    x, each = group_inputs(shape, projections, g)
    m, k = shape
    found, given, dx = {"x": bf16(x)}, [], np.zeros((m, k))
    for i, (weight, a, b, kept, own) in enumerate(each):
        h_scale, up = own["scale"]
        masked_scale = own["masked_scale"] = 2 * up if "seed" in own else up
        n, r = b.shape
        dy, h = ternary(g, m, n, keep=min(n // 4, 20)), ternary(g, m, r, keep=r // 2 + 1)
        dh = h_scale * dy @ b
        assert np.array_equal(value_of(exact(dh)), dh)
        dx += dy @ weight + np.where(kept, masked_scale * (dh @ a), 0)
        da, db = masked_scale * dh.T @ (x * kept), up * dy.T @ h
        gradients = dict(da=da.astype(np.float32), db=exact(db), dbias=exact(dy.sum(0)))
        wanted = own.pop("wanted", ["da", "db"])
        operands = dict(dy=dy, weight=weight, a=a, b=b, h=h)
        found |= {f"{name}{i}": bf16(array) for name, array in operands.items()}
        found |= {f"{name}{i}": gradients[name] for name in wanted}
        given.append(own)
    if options.get("dx", True):
        found["dx"] = exact(dx)
    options = {name: value for name, value in options.items() if name != "dx"}
    return found | {"options": np.array(json.dumps(options | dict(each=given, kernels=kernels)))}


def all_problems() -> dict[str, dict[str, np.ndarray]]:
    found = {f"forward_group-{i}": forward_group_problem(*c) for i, c in enumerate(FORWARD_GROUPS)}
    for i, case in enumerate(BACKWARD_GROUPS):
        found[f"backward_group-{i}"] = backward_group_problem(*case)
    return found

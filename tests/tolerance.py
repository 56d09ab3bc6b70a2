"""The acceptance criterion; C1's numbers and float64 evaluation are `lora_kernels.criterion`'s.

Every bound is against float64 evaluation of the exact formula on the same stored inputs (adapters
as cast) with the same mask. u is the unit roundoff of a dtype, S the sum of the magnitudes that a
result adds up, I the same for the rounded intermediate h or dh, L the length of the reduction.

C1  every element: |error| <= 1.05 (u_out |o| + u_mid I) + L 2^-23 S + 2^-149
C2  norms: |error| / |o| <= NORM[dtype, kind], for results of at least 4096 elements
C3  16 bits, against eager PyTorch in the same dtype: RMS error <= eager's, largest <= 2x eager's
C4  exactly representable problems: bitwise equal
C5  C1 again with W = 0 (also with B of scale 1e-3), and with B = 0: each term on its own
C7  200 steps of training beside eager PyTorch with the same masks: each step's loss within
    TRAINING_LOSS and no further from eager's than other masks take eager from itself; what each
    adapter has learnt at a cosine above 0.999; every gradient non-zero, and of eager's size
"""

from __future__ import annotations

import torch
from problems import Problem
from torch import Tensor

from lora_kernels.criterion import UNIT, group_oracle, oracle, usage

# C2, in units of u of the operands' dtype. `wide`: an fp32 gradient of 16-bit operands.
NORM = {"activation": 0.75, "adapter": 0.80, "wide": 0.55, "fp32": 32.0}
EAGER_NORM = 1.0  # an eager-like path rounds the frozen product and each intermediate once more
NORM_MIN_ELEMENTS = 4096
EAGER_RMS = 1.0
EAGER_MAX = 2.0
TRAINING_STEPS = 200
TRAINING_SEEDS = 3  # of the masks
# C7 names 16 bits only; in float32 rounding is 2^-16 of that, and training amplifies it a little.
TRAINING_LOSS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
TRAINING_COSINE = 0.999
TRAINING_GRADIENT = 0.02  # relative, in norm: AdamW's steps would not show a factor


def c1_usage(p: Problem, got: dict[str, Tensor], *, eager_like: bool = False) -> dict[str, float]:
    """Largest error / bound of each result; C1 holds where it is at most 1."""
    return usage(oracle(p), got, p.x.dtype, eager_like=eager_like)


def assert_c1(p: Problem, got: dict[str, Tensor], *, eager_like: bool = False) -> None:
    for name, found in c1_usage(p, got, eager_like=eager_like).items():
        assert found <= 1.0, f"C1: {name} uses {found:.3g} of its bound"


def assert_c1_group(parts: list[Problem], dx: Tensor, *, eager_like: bool = False) -> None:
    """C1 of the dx that projections of one x have in common: one sum, with one rounding."""
    o = group_oracle([oracle(p) for p in parts])
    for name, found in usage(o, {"x": dx}, parts[0].x.dtype, eager_like=eager_like).items():
        assert found <= 1.0, f"C1: {name} of the group uses {found:.3g} of its bound"


def assert_c2(p: Problem, got: dict[str, Tensor], *, eager_like: bool = False) -> None:
    o = oracle(p)
    for name, value in got.items():
        exact = o.value[name]
        if name == "bias" or exact.numel() < NORM_MIN_ELEMENTS:
            continue
        wide = value.dtype == torch.float32 and p.x.dtype != torch.float32
        kind = "wide" if wide else "activation" if name in ("x", "y") else "adapter"
        limit = NORM["fp32"] if p.x.dtype == torch.float32 else NORM[kind]
        if eager_like and p.x.dtype != torch.float32:
            limit = EAGER_NORM
        error = ((value.double() - exact).norm() / exact.norm()).item() / UNIT[p.x.dtype]
        assert error <= limit, f"C2: {name} is off by {error:.3g} u, the limit is {limit} u"


def assert_c3(p: Problem, got: dict[str, Tensor]) -> None:
    o, eager = oracle(p), p.eager()
    for name, value in got.items():
        if name == "bias":
            continue
        ours, theirs = (t.double() - o.value[name] for t in (value, eager[name]))
        rms, peak = ours.norm() / theirs.norm(), ours.abs().max() / theirs.abs().max()
        assert rms <= EAGER_RMS, f"C3: RMS error of {name} is {rms:.3f} of eager's"
        assert peak <= EAGER_MAX, f"C3: largest error of {name} is {peak:.3f} of eager's"


def assert_c4(p: Problem, got: dict[str, Tensor]) -> None:
    o = oracle(p)
    for name, value in got.items():
        assert torch.equal(value.double(), o.value[name]), f"C4: {name} is not exact"


def c7_violations(dtype: torch.dtype, found: dict) -> list[str]:
    """What breaks C7 in the result of bench.training's `compare`; nothing if it holds.

    Written so that a NaN breaks it.
    """
    broken = []
    loss, spread = found["loss_difference"], found["eager_spread"]
    if not loss <= TRAINING_LOSS[dtype]:
        broken.append(f"a loss is {loss:.2e} off eager's, the limit is {TRAINING_LOSS[dtype]:.0e}")
    if not loss <= spread:
        broken.append(f"a loss is {loss:.2e} off eager's, other masks make {spread:.2e}")
    if not found["cosine"] > TRAINING_COSINE:
        broken.append(f"an adapter learnt otherwise: cosine {found['cosine']:.6f} to eager's")
    if not found["gradient_difference"] <= TRAINING_GRADIENT:
        broken.append(f"a gradient is {found['gradient_difference']:.1%} off eager's size")
    if found["idle"]:
        broken.append(f"without gradient or change: {', '.join(found['idle'])}")
    return broken

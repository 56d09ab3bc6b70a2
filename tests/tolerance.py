"""The acceptance criterion: the one place where a tolerance stands.

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

from dataclasses import dataclass

import torch
from problems import Problem
from torch import Tensor

import lora_kernels as lk

UNIT = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
SLACK = 1.05
ACCUMULATE = 2.0**-23  # relative error of one fp32 accumulation step, truncation included
# Largest of |o| 2^-k that a result may lose to gradual underflow.
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}
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


@dataclass(frozen=True)
class Oracle:
    """float64 results by name, S, I and L of C1, and what an eager-like path rounds once more."""

    value: dict[str, Tensor]
    total: dict[str, Tensor]
    middle: dict[str, Tensor]
    length: dict[str, int]
    partial: dict[str, Tensor]


def oracle(p: Problem) -> Oracle:
    """Evaluates section 1 of the contract, and its magnitudes, in float64."""
    dtype, k, n = p.x.dtype, p.x.shape[-1], p.weight.shape[0]
    rows = p.x.shape[:-1].numel()
    x, dy = p.x.double().reshape(rows, k), p.dy.double().reshape(rows, n)
    w, a, b = p.weight.double(), p.lora_a.to(dtype).double(), p.lora_b.to(dtype).double()
    s = p.scaling
    m = torch.ones_like(x)
    if p.dropout_p > 0:
        mask = lk.dropout.reference_mask(p.seed, *x.shape, lk.dropout.drop_threshold(p.dropout_p))
        m = mask.double() / lk.keep_probability(p.dropout_p)  # bool / float would be float32
    xd = torch.where(m > 0, x * m, 0)
    h, dh = s * xd @ a.T, s * dy @ b
    base_y, base_dx, lora_dx = x @ w.T, dy @ w, torch.where(m > 0, (dh @ a) * m, 0)
    ax, aw, aa, ab, ad, axd = (t.abs() for t in (x, w, a, b, dy, xd))
    sh, sdh = abs(s) * axd @ aa.T, abs(s) * ad @ ab
    bias = torch.zeros(n).double() if p.bias is None else p.bias.double()
    r = a.shape[0]
    shape_x = p.x.shape
    return Oracle(
        value={
            "y": (base_y + h @ b.T + bias).reshape(p.dy.shape),
            "x": (base_dx + lora_dx).reshape(shape_x),
            "lora_a": dh.T @ xd,
            "lora_b": dy.T @ h,
            "bias": dy.sum(0),
        },
        total={
            "y": (ax @ aw.T + sh @ ab.T + bias.abs()).reshape(p.dy.shape),
            "x": (ad @ aw + (sdh @ aa) * m).reshape(shape_x),
            "lora_a": sdh.T @ axd,
            "lora_b": ad.T @ sh,
            "bias": ad.sum(0),
        },
        middle={
            "y": (h.abs() @ ab.T).reshape(p.dy.shape),
            "x": ((dh.abs() @ aa) * m).reshape(shape_x),
            "lora_a": dh.abs().T @ axd,
            "lora_b": ad.T @ h.abs(),
            "bias": torch.zeros(n).double(),
        },
        length={"y": k + r + 1, "x": n + r, "lora_a": n + rows, "lora_b": k + rows, "bias": rows},
        partial={
            "y": ((base_y + bias).abs() + (h @ b.T).abs()).reshape(p.dy.shape),
            "x": (base_dx.abs() + 2 * lora_dx.abs()).reshape(shape_x),
            "lora_a": (dh.T @ xd).abs(),
            "lora_b": (dy.T @ h).abs(),
            "bias": torch.zeros(n).double(),
        },
    )


def c1_usage(p: Problem, got: dict[str, Tensor], *, eager_like: bool = False) -> dict[str, float]:
    """Largest error / bound of each result; C1 holds where it is at most 1."""
    return _c1_usage(p, oracle(p), got, eager_like)


def _c1_usage(p: Problem, o: Oracle, got: dict[str, Tensor], eager_like: bool) -> dict[str, float]:
    u = UNIT[p.x.dtype]
    usage = {}
    for name, value in got.items():
        exact = o.value[name]
        bound = SLACK * (UNIT[value.dtype] * exact.abs() + u * o.middle[name])
        if p.x.dtype != torch.float64:
            bound = bound + o.length[name] * ACCUMULATE * o.total[name] + TINY[value.dtype]
        else:
            bound = bound + 2 * o.length[name] * u * o.total[name]
        if eager_like:
            bound = bound + SLACK * u * o.partial[name]
        error = (value.double() - exact).abs()
        # A result that is exactly zero by construction must be zero: 0 / 0 counts as met.
        ratio = torch.where(error == 0, 0.0, error / bound)
        usage[name] = ratio.max().item() if ratio.numel() else 0.0
    return usage


def assert_c1(p: Problem, got: dict[str, Tensor], *, eager_like: bool = False) -> None:
    for name, usage in c1_usage(p, got, eager_like=eager_like).items():
        assert usage <= 1.0, f"C1: {name} uses {usage:.3g} of its bound"


def assert_c1_group(parts: list[Problem], dx: Tensor, *, eager_like: bool = False) -> None:
    """C1 of the dx that projections of one x have in common: one sum, with one rounding."""
    oracles = [oracle(p) for p in parts]
    value, total, middle, partial = (
        {"x": torch.stack([getattr(o, kind)["x"] for o in oracles]).sum(0)}
        for kind in ("value", "total", "middle", "partial")
    )
    # An eager-like path rounds the sum of what it has after each of two products a projection.
    partial["x"] = 2 * len(parts) * partial["x"]
    length = {"x": sum(o.length["x"] + 1 for o in oracles)}
    of_sum = Oracle(value, total, middle, length, partial)
    for name, usage in _c1_usage(parts[0], of_sum, {"x": dx}, eager_like).items():
        assert usage <= 1.0, f"C1: {name} of the group uses {usage:.3g} of its bound"


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

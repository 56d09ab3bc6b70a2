"""The acceptance criterion against float64: what is right, for the tests and for selfcheck.

u is the unit roundoff of a dtype, S the sum of the magnitudes that a result adds up, I the same for
the rounded intermediate h or dh, L the length of the reduction. Every element has

    |error| <= 1.05 (u_out |o| + u_mid I) + L 2^-23 S + 2^-149

against float64 evaluation of the exact formula on the same stored inputs (adapters as cast) with
the same mask. An eager-like path rounds the frozen product once more: its bound says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import dropout

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


class Problem(Protocol):
    """Inputs of one call, in the dtypes they are stored in, and the upstream gradient."""

    @property
    def x(self) -> Tensor: ...  # [..., K]
    @property
    def weight(self) -> Tensor: ...  # [N, K]
    @property
    def lora_a(self) -> Tensor: ...  # [r, K]
    @property
    def lora_b(self) -> Tensor: ...  # [N, r]
    @property
    def bias(self) -> Tensor | None: ...  # [N]
    @property
    def dy(self) -> Tensor: ...  # [..., N]
    @property
    def scaling(self) -> float: ...
    @property
    def dropout_p(self) -> float: ...
    @property
    def seed(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Oracle:
    """float64 results by name, S, I and L above, and what an eager-like path rounds once more.

    Names: y, h and dh, and x, lora_a, lora_b and bias for the gradients.
    """

    value: dict[str, Tensor]
    total: dict[str, Tensor]
    middle: dict[str, Tensor]
    length: dict[str, int]
    partial: dict[str, Tensor]


def oracle(p: Problem, rows: Tensor | None = None) -> Oracle:
    """Evaluates the contract, and its magnitudes, in float64.

    Args:
        rows: indices of the rows at which y and the gradient of x are evaluated, and then [rows, N]
            and [rows, K]; None: all. The other results sum over all rows whatever `rows` is.
    """
    dtype, k, n = p.x.dtype, p.x.shape[-1], p.weight.shape[0]
    count, s = p.x.shape[:-1].numel(), p.scaling
    x, dy = p.x.double().reshape(count, k), p.dy.double().reshape(count, n)
    w, a, b = p.weight.double(), p.lora_a.to(dtype).double(), p.lora_b.to(dtype).double()
    r = a.shape[0]
    m = _inverse_mask(p, count, k)
    xd = x if m is None else torch.where(m > 0, x * m, 0)
    h, dh = s * xd @ a.T, s * dy @ b
    sh, sdh = abs(s) * xd.abs() @ a.abs().T, abs(s) * dy.abs() @ b.abs()
    bias = x.new_zeros(n) if p.bias is None else p.bias.double()
    of_adapters = Oracle(
        value={"h": h, "dh": dh, "lora_a": dh.T @ xd, "lora_b": dy.T @ h, "bias": dy.sum(0)},
        total={
            "h": sh,
            "dh": sdh,
            "lora_a": sdh.T @ xd.abs(),
            "lora_b": dy.abs().T @ sh,
            "bias": dy.abs().sum(0),
        },
        middle={
            "h": x.new_zeros(count, r),
            "dh": x.new_zeros(count, r),
            "lora_a": dh.abs().T @ xd.abs(),
            "lora_b": dy.abs().T @ h.abs(),
            "bias": x.new_zeros(n),
        },
        length={"h": k, "dh": n, "lora_a": n + count, "lora_b": k + count, "bias": count},
        partial={
            "h": x.new_zeros(count, r),
            "dh": x.new_zeros(count, r),
            "lora_a": (dh.T @ xd).abs(),
            "lora_b": (dy.T @ h).abs(),
            "bias": x.new_zeros(n),
        },
    )
    shapes: tuple[Sequence[int], Sequence[int]] = p.dy.shape, p.x.shape
    if rows is not None:
        shapes = (len(rows), n), (len(rows), k)
        x, dy, h, dh, sh, sdh = (t[rows] for t in (x, dy, h, dh, sh, sdh))
        m = None if m is None else m[rows]
    of_rows = _row_results(x, dy, w, a, b, bias, m, (h, dh, sh, sdh), shapes)
    return Oracle(
        **{
            kind: getattr(of_adapters, kind) | getattr(of_rows, kind)
            for kind in ("value", "total", "middle", "length", "partial")
        }
    )


def _inverse_mask(p: Problem, rows: int, cols: int) -> Tensor | None:
    """1/q where an element is kept, 0 where it is dropped; None without dropout."""
    if p.dropout_p == 0:
        return None
    assert p.seed is not None, "a problem with dropout has a seed"
    mask = dropout.reference_mask(p.seed, rows, cols, dropout.drop_threshold(p.dropout_p))
    return mask.double() / dropout.keep_probability(p.dropout_p)  # bool / float would be float32


def _row_results(x, dy, w, a, b, bias, m, ranks, shapes) -> Oracle:
    """Of y and the gradient of x, whose rows do not depend on each other."""
    h, dh, sh, sdh = ranks
    shape_y, shape_x = shapes

    def masked(t: Tensor) -> Tensor:
        return t if m is None else torch.where(m > 0, t * m, 0)

    base_y, base_dx, lora_dx = x @ w.T, dy @ w, masked(dh @ a)
    aw, aa, ab = w.abs(), a.abs(), b.abs()
    r = a.shape[0]

    def pair(y: Tensor, dx: Tensor) -> dict[str, Tensor]:
        return {"y": y.reshape(shape_y), "x": dx.reshape(shape_x)}

    return Oracle(
        value=pair(base_y + h @ b.T + bias, base_dx + lora_dx),
        total=pair(x.abs() @ aw.T + sh @ ab.T + bias.abs(), dy.abs() @ aw + masked(sdh @ aa)),
        middle=pair(h.abs() @ ab.T, masked(dh.abs() @ aa)),
        length={"y": x.shape[1] + r + 1, "x": dy.shape[1] + r},
        partial=pair((base_y + bias).abs() + (h @ b.T).abs(), base_dx.abs() + 2 * lora_dx.abs()),
    )


def group_oracle(oracles: Sequence[Oracle]) -> Oracle:
    """Of the gradient of an x that several projections share: one sum, with one rounding."""
    value, total, middle, partial = (
        {"x": torch.stack([getattr(o, kind)["x"] for o in oracles]).sum(0)}
        for kind in ("value", "total", "middle", "partial")
    )
    # An eager-like path rounds the sum of what it has after each of two products a projection.
    partial["x"] = 2 * len(oracles) * partial["x"]
    length = {"x": sum(o.length["x"] + 1 for o in oracles)}
    return Oracle(value, total, middle, length, partial)


def usage(
    o: Oracle, got: Mapping[str, Tensor], dtype: torch.dtype, *, eager_like: bool = False
) -> dict[str, float]:
    """Largest error / bound of each result, for operands of `dtype`; right where it is at most 1.

    NaN where the error is: write `not usage <= 1`.
    """
    u, found = UNIT[dtype], {}
    for name, value in got.items():
        exact = o.value[name]
        bound = SLACK * (UNIT[value.dtype] * exact.abs() + u * o.middle[name])
        if dtype != torch.float64:
            bound = bound + o.length[name] * ACCUMULATE * o.total[name] + TINY[value.dtype]
        else:
            bound = bound + 2 * o.length[name] * u * o.total[name]
        if eager_like:
            bound = bound + SLACK * u * o.partial[name]
        error = (value.double() - exact).abs()
        # A result that is exactly zero by construction must be zero: 0 / 0 counts as met.
        ratio = torch.where(error == 0, 0.0, error / bound)
        found[name] = ratio.max().item() if ratio.numel() else 0.0
    return found

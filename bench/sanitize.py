"""`python -m bench.sanitize`: every CUDA kernel once on a few small shapes, for compute-sanitizer.

Only our kernels run on the GPU: operands are made on the CPU and results are compared there, so
that no vendor's kernel is instrumented or blamed. Each call runs twice and must give the same bits.
Masks must equal lora_kernels.dropout.reference_mask; every other result is within rounding of
lora_kernels.composed in float64. forward_as and backward_as are the passes in the form that they
are told to take; calls that the plan of a form refuses are counted and named. Exits with 1 if a
result is wrong. The operators take turns, and what there was no time for is counted too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import backend, composed, dropout, schemas

from . import stages

OPS = (
    "dropout_mask", "down_proj", "fused_gemm", "weight_grad", "forward", "forward_as", "backward",
        "backward_as", "forward_group", "backward_group",
)  # fmt: skip
GROUPS = ("forward_group", "backward_group")
# They round h and dh on the way.
CHAINED = ("forward", "forward_as", "backward", "backward_as", *GROUPS)
FORMS = ("one_launch", "two_launches", "sm80")
DECODE_ROWS = 64  # of x, at most, in a form of its own
BACKWARD_FORMS = ("one_grid", "passes", "sm80")
DTYPES = (torch.bfloat16, torch.float16)
# M, N, K, r: one element, ragged everywhere, a multiple of every tile, and more than one tile.
SHAPES = ((1, 8, 8, 1), (17, 40, 72, 3), (128, 128, 128, 16), (145, 264, 328, 24))
MORE_SHAPES = {
    "forward_as": ((40, 264, 136, 65), (130, 72, 200, 128)),  # wide ranks
    "weight_grad": ((40, 264, 136, 65), (130, 72, 200, 300)),
    # one for passes alone; two chunks of 512 rows and two slices of 512 columns in one grid
    "backward_as": ((40, 264, 136, 65), (540, 72, 584, 40)),
}
MARGIN = 6.0  # seconds before the stage's end that the tool has for its summary
WINDOWS = ((1, 1), (17, 33), (64, 128), (130, 70))
SEEDS = ((1, 2), (7, 3, 5, 11))  # (seed, offset), and with (row0, col0)
DROPOUTS = (0.0, 0.3)
SCALE, UP_SCALE = 1.5, 0.75


class Call(NamedTuple):
    """One call of an operator; its tensors are on the CPU, None where it takes no tensor."""

    op: str
    args: tuple
    length: int  # of the longest reduction


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _masks() -> Iterator[Call]:
    for rows, cols in WINDOWS:
        for seed in SEEDS:
            yield Call("dropout_mask", (torch.tensor(seed), rows, cols, 4915), 0)


def _products(op: str, dtype: torch.dtype, shape: tuple[int, ...], p: float) -> Iterator[Call]:
    """Calls of one op as the forward and backward pass of a layer make them."""
    m, n, k, r = shape
    normal = functools.partial(_normal, dtype=dtype)
    x, weight, a, b, dy = normal(m, k), normal(n, k), normal(r, k), normal(n, r), normal(m, n)
    h, bias = normal(m, r), normal(n)
    drop = (torch.tensor(SEEDS[1]), dropout.drop_threshold(p)) if p > 0 else (None, 0)
    if op == "down_proj":
        yield Call(op, (x, a, *drop, SCALE), k)
        yield Call(op, (dy, b.t(), None, 0, SCALE), n)
    elif op == "fused_gemm":
        yield Call(op, (x, weight, h, b, bias, None, 0, SCALE), k + r)
        yield Call(op, (dy, weight.t(), h, a.t(), None, *drop, SCALE), n + r)
        if p > 0:  # the kernel with a mask has one order of the weight, and copies the other
            k_major = weight.t().contiguous()
            yield Call(op, (_misaligned(dy), k_major, h, a.t(), None, *drop, SCALE), n + r)
    elif op == "weight_grad":
        yield Call(op, (h, x, *drop, SCALE, False, False), m)
        yield Call(op, (_misaligned(h), _misaligned(x), *drop, SCALE, True, False), m)
        yield Call(op, (h, dy, None, 0, SCALE, p > 0, True), m)
    elif op == "forward":
        yield Call(op, (x, weight, a, b, bias, *drop, SCALE, 1.0), k + r)
    elif op == "backward":
        flags = (False, False, True, True, True, True)
        yield Call(op, (dy, x, weight, a, b, h, *drop, SCALE, 1.0, *flags), m + n + r)


def _misaligned(t: Tensor) -> Tensor:
    """The same values at an odd offset and row stride, in elements; NaN around them."""
    rows, cols = t.shape
    wide = torch.empty(rows * (cols + 1) + 1, dtype=t.dtype).fill_(torch.nan)
    moved = wide[1:].view(rows, cols + 1)[:, :cols]
    return moved.copy_(t)


def _forms(dtype: torch.dtype, shape: tuple[int, ...], p: float) -> Iterator[Call]:
    """Calls of forward_as: each form with and without bias, on each layout, and no LoRA at all."""
    m, n, k, r = shape
    normal = functools.partial(_normal, dtype=dtype)
    x, weight, a, b, bias = normal(m, k), normal(n, k), normal(r, k), normal(n, r), normal(n)
    drop = (torch.tensor(SEEDS[1]), dropout.drop_threshold(p)) if p > 0 else (None, 0)
    mn_major = weight.t().contiguous().t()
    for form in FORMS:
        for operands in (
            (x, weight, a, b, bias),
            (x, mn_major, a, b, None),
            (_misaligned(x), weight, a, b, None),
        ):
            yield Call("forward_as", (*operands, *drop, SCALE, 1.0, form, 0, 0), k + r)
    if m <= DECODE_ROWS:
        for operands in (
            (x, weight, a, b, bias),
            (_misaligned(x), weight, a, _misaligned(b), None),
        ):
            yield Call("forward_as", (*operands, *drop, SCALE, 1.0, "decode", 0, 0), k + r)
    if p == 0:
        for w, bias_or_none in ((weight, None), (mn_major, bias)):
            operands = (x, w, a[:0], b[:, :0], bias_or_none, *drop)
            yield Call("forward_as", (*operands, 1.0, 1.0, "", 0, 0), k)


def _backward_forms(dtype: torch.dtype, shape: tuple[int, ...], p: float) -> Iterator[Call]:
    """Calls of backward_as: both forms on each layout, and passes for some of the gradients."""
    m, n, k, r = shape
    normal = functools.partial(_normal, dtype=dtype)
    dy, x, weight, a, b, h = (normal(*s) for s in ((m, n), (m, k), (n, k), (r, k), (n, r), (m, r)))
    drop = (torch.tensor(SEEDS[1]), dropout.drop_threshold(p)) if p > 0 else (None, 0)
    dense = (dy, x, weight, a, b, h)
    ragged = tuple(map(_misaligned, dense))
    k_major = (dy, x, weight.t().contiguous().t(), a, b, h)  # for dx
    for form, operands, wide, needs, tile_n in (  # gradients of x, A, B and the bias
        ("one_grid", dense, (False, False), (True, True, True, False), 128),
        ("one_grid", ragged, (True, True), (True, True, True, False), 256),
        ("passes", dense, (True, False), (True, True, True, True), 0),
        ("passes", ragged, (False, True), (True, True, True, False), 192),
        ("passes", k_major, (True, True), (True, True, False, False), 0),
        ("passes", dense, (False, True), (False, False, True, True), 0),
        ("sm80", dense, (False, True), (True, True, True, True), 0),
        ("sm80", ragged, (True, False), (True, True, True, False), 0),
    ):
        scales = (SCALE, UP_SCALE)
        args = (*operands, *drop, *scales, *wide, *needs, form, tile_n, 0)
        yield Call("backward_as", args, m + n + r)


def _groups(op: str, dtype: torch.dtype, shape: tuple[int, ...], p: float) -> Iterator[Call]:
    """Calls of three projections that differ in N and r, as they lie and out of line."""
    m, n, k, r = shape
    normal = functools.partial(_normal, dtype=dtype)
    x, ns, rs = normal(m, k), (n, n + 8, 8), (r, 8, 2 * r)
    weights, lora_as = [normal(n, k) for n in ns], [normal(r, k) for r in rs]
    lora_bs = [normal(n, r) for n, r in zip(ns, rs, strict=True)]
    dys, hs = [normal(m, n) for n in ns], [normal(m, r) for r in rs]
    seeds = [torch.tensor((i, *SEEDS[1][1:])) if p > 0 else None for i in range(3)]
    threshold, scales = dropout.drop_threshold(p), ([SCALE] * 3, [UP_SCALE] * 3)
    no = [False] * 3
    for lie in (lambda t: t, _misaligned):
        operands = ([lie(t) for t in ts] for ts in (weights, lora_as, lora_bs))
        if op == "forward_group":
            args = (lie(x), *operands, [normal(n), None, None], seeds, threshold, *scales)
            yield Call(op, args, k + 2 * r)
            continue
        lists = [[lie(t) for t in dys], *operands, hs, seeds]
        for needs in ((True, [True, False, True], [True, True, False], [False, False, True]),
                      (False, [False, True, True], no, no)):  # fmt: skip
            args = (lie(x), *lists, threshold, *scales, [True, False, False], no, *needs)
            yield Call(op, args, m + sum(ns) + sum(rs))


def calls(op: str) -> Iterator[Call]:
    torch.manual_seed(0)
    if op == "dropout_mask":
        yield from _masks()
        return
    made = {"forward_as": _forms, "backward_as": _backward_forms}
    made |= {name: functools.partial(_groups, name) for name in GROUPS}
    of_layer = made.get(op, functools.partial(_products, op))
    for dtype in DTYPES:
        for shape in SHAPES + MORE_SHAPES.get(op, ()):
            for p in DROPOUTS:
                yield from of_layer(dtype, shape, p)


def _map(args: Sequence, change: Callable[[Tensor], Tensor]) -> tuple:
    def changed(value):
        if isinstance(value, list):
            return list(_map(value, change))
        return change(value) if isinstance(value, Tensor) else value

    return tuple(map(changed, args))


def _tuple(result: Tensor | Sequence) -> tuple[Tensor, ...]:
    """All tensors of a result, which may be lists."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for part in result for t in _tuple(part))


def _exact(call: Call, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """composed in float64, on operands passed through `change`."""
    args = list(_map(call.args, lambda t: change(t.double()) if t.is_floating_point() else t))
    if call.op == "weight_grad":
        args[5] = False  # `wide` would round the operands to float32
    if call.op in ("backward", "backward_as"):
        args[10:12] = False, False
    if call.op == "backward_group":
        args[10:12] = [False] * 3, [False] * 3
    if call.op in GROUPS:
        return _tuple(getattr(composed, "group_" + call.op.removesuffix("_group"))(*args))
    if call.op.endswith("_as"):
        args = args[:-3]
    return _tuple(getattr(composed, call.op.removesuffix("_as"))(*args))


def wrong(call: Call, got: tuple[Tensor, ...]) -> str | None:
    """What is wrong with results that are on the CPU, or None."""
    if call.op == "dropout_mask":
        same = torch.equal(got[0], dropout.reference_mask(*call.args))
        return None if same else "the mask differs from the specification"
    exact, total = _exact(call, lambda t: t), _exact(call, Tensor.abs)
    step = call.length * 2.0**-23
    if call.op in CHAINED:
        step += 4 * torch.finfo(call.args[0].dtype).eps
    for i, (value, want, size) in enumerate(zip(got, exact, total, strict=True)):
        if value.shape != want.shape:
            return f"result {i} is {list(value.shape)}, expected {list(want.shape)}"
        limits = torch.finfo(value.dtype)
        bound = limits.eps * want.abs() + step * size + limits.smallest_normal * limits.eps
        off = ((value.double() - want).abs() / bound).nan_to_num(torch.inf)
        if off.numel() and (worst := off.max().item()) > 1:
            return f"result {i} is off by {worst:.3g} times its bound"
    return None


def kind(call: Call) -> str:
    """The operator, and the form that it is told to take."""
    form = f" {call.args[-3] or 'plain'}" if call.op.endswith("_as") else ""
    return call.op + form


def turns(ops: Sequence[str]) -> list[Call]:
    """All calls of the operators, one of each kind in turn; those of one in an order that is mixed.

    However few there is time for, they have every kind, and few of its arguments in common.
    """
    mixed: dict[str, list[Call]] = {}
    for op in ops:
        for call in calls(op):
            mixed.setdefault(kind(call), []).append(call)
    for found in mixed.values():
        random.Random(0).shuffle(found)
    in_turn = (call for turn in itertools.zip_longest(*mixed.values()) for call in turn)
    return [call for call in in_turn if call is not None]


def run(call: Call, device: str) -> list[tuple[Tensor, ...]]:
    """The results of one call, made twice on the device, where they are."""
    args = _map(call.args, lambda t: moved(t, device))
    op = getattr(torch.ops.lora_kernels, call.op)
    found = [_tuple(op(*args)) for _ in range(2)]
    if device == "cuda":
        torch.cuda.synchronize()  # a fault belongs to this call
    return found


def check(call: Call, device: str) -> str | None:
    """Runs one call twice on the device: what is wrong, or None."""
    first, second = (tuple(t.cpu() for t in results) for results in run(call, device))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return "two runs differ"
    return wrong(call, first)


def moved(t: Tensor, device: str) -> Tensor:
    """On the device without a kernel, at the strides and the offset that it has in its storage.

    `Tensor.to` keeps strides only where the elements lie side by side.
    """
    size = t.untyped_storage().nbytes() // t.element_size()
    storage = t.as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def refused(call: Call, device: str) -> str | None:
    """Why this form cannot serve the call, by its plan; None if it can, or takes no form."""
    if not call.op.endswith("_as"):
        return None
    if call.op == "forward_as":
        x, weight, a, b, _, seed, *_ = call.args
    else:
        _, x, weight, a, b, _, seed, *_ = call.args
    plan = getattr(torch.ops.lora_kernels, call.op.replace("_as", "_plan"))
    operands = _map((x, weight, a, b, seed), lambda t: moved(t, device))
    try:
        plan(*operands, *call.args[-3:])
    except RuntimeError as why:
        return str(why).strip().partition("\n")[0]
    return None


def _described(call: Call) -> str:
    """The op and its arguments: of a tensor the shape, and how it lies unless that is plain."""
    return f"{call.op}({_listed(call.args)})"


def _listed(values: Sequence) -> str:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            text = str(list(value.shape))
            if not value.is_contiguous() or value.storage_offset():
                text += f" strides {list(value.stride())} offset {value.storage_offset()}"
            found.append(text)
        elif isinstance(value, list):
            found.append(f"[{_listed(value)}]")
        else:
            found.append(repr(value))
    return ", ".join(found)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--run-only", action="store_true",
        help="compare nothing: for initcheck, which until CUDA 13.1 takes what TMA stored for "
        "uninitialised when it is copied to the host",
    )  # fmt: skip
    args = parser.parse_args()
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        return stages.skip("torch sees no CUDA device")
    ops = [op for op in OPS if schemas.runs_here(op, device.upper())]
    if not ops:
        return stages.skip(f"no {device} kernels: {schemas.EXTENSION_ERROR or 'not in this build'}")
    if device == "cpu":
        backend.multiply_natively()  # the bound allows one rounding
    checked = failed = not_served = 0
    found = turns(ops)
    tried, ran = set(), {}
    for place, call in enumerate(found):
        if stages.seconds_left() < MARGIN:
            print(f"no time for {len(found) - place} calls")
            break
        tried.add(kind(call))
        if (why := refused(call, device)) is not None:
            not_served += 1
            print(f"not served {_described(call)}: {why}")
            continue
        checked += 1
        ran[kind(call)] = None
        if args.run_only:
            run(call, device)
        elif (problem := check(call, device)) is not None:
            failed += 1
            print(f"WRONG {_described(call)}: {problem}")
    if not_served:
        print(f"refused {not_served} calls")
    if never := [name for name in dict.fromkeys(map(kind, found)) if name not in tried]:
        print(f"no call of {', '.join(never)} was made")
    did = "ran" if args.run_only else "checked"
    print(f"{did} {checked} calls of {', '.join(ran)}: {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

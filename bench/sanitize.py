"""`python -m bench.sanitize`: every CUDA kernel once on a few small shapes, for compute-sanitizer.

Only our kernels run on the GPU: operands are made on the CPU and results are compared there, so
that no vendor's kernel is instrumented or blamed. Each call runs twice and must give the same bits.
Masks must equal lora_kernels.dropout.reference_mask; every other result is within rounding of
lora_kernels.composed in float64. forward_as is the forward pass in the form that it is told to
take; calls that the plan of a form refuses are counted and named. Exits with 1 if a result is
wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import composed, dropout, schemas

from .stages import skip

OPS = (
    "dropout_mask", "down_proj", "fused_gemm", "weight_grad", "forward", "forward_as", "backward",
)  # fmt: skip
CHAINED = ("forward", "forward_as", "backward")  # they round h and dh on the way
FORMS = ("one_launch", "two_launches")
DTYPES = (torch.bfloat16, torch.float16)
# M, N, K, r: one element, ragged everywhere, a multiple of every tile, and more than one tile.
SHAPES = ((1, 8, 8, 1), (17, 40, 72, 3), (128, 128, 128, 16), (145, 264, 328, 24))
MORE_SHAPES = ((40, 264, 136, 65), (130, 72, 200, 128))  # of forward_as: wide ranks
WINDOWS = ((1, 1), (17, 33), (64, 128), (130, 70))
SEEDS = ((1, 2), (7, 3, 5, 11))  # (seed, offset), and with (row0, col0)
DROPOUTS = (0.0, 0.3)
SCALE = 1.5


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
        # on CUDA a mask on the LoRA term is composed's
        yield Call(op, (dy, weight.t(), h, a.t(), None, None, 0, SCALE), n + r)
    elif op == "weight_grad":
        for wide in (False, True):
            yield Call(op, (h, x, *drop, SCALE, wide, False), m)
            yield Call(op, (h, dy, None, 0, SCALE, wide, True), m)
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
    if p == 0:
        for w, bias_or_none in ((weight, None), (mn_major, bias)):
            operands = (x, w, a[:0], b[:, :0], bias_or_none, *drop)
            yield Call("forward_as", (*operands, 1.0, 1.0, "", 0, 0), k)


def calls(op: str) -> Iterator[Call]:
    torch.manual_seed(0)
    if op == "dropout_mask":
        yield from _masks()
        return
    for dtype in DTYPES:
        for shape in SHAPES + (MORE_SHAPES if op == "forward_as" else ()):
            for p in DROPOUTS:
                if op == "forward_as":
                    yield from _forms(dtype, shape, p)
                else:
                    yield from _products(op, dtype, shape, p)


def _map(args: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(change(t) if isinstance(t, Tensor) else t for t in args)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _exact(call: Call, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """composed in float64, on operands passed through `change`."""
    args = list(_map(call.args, lambda t: change(t.double()) if t.is_floating_point() else t))
    if call.op == "weight_grad":
        args[5] = False  # `wide` would round the operands to float32
    if call.op == "forward_as":
        return composed.forward(*args[:-3])
    return _tuple(getattr(composed, call.op)(*args))


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
        limits = torch.finfo(value.dtype)
        bound = limits.eps * want.abs() + step * size + limits.smallest_normal * limits.eps
        off = ((value.double() - want).abs() / bound).nan_to_num(torch.inf)
        if off.numel() and (worst := off.max().item()) > 1:
            return f"result {i} is off by {worst:.3g} times its bound"
    return None


def check(call: Call, device: str) -> str | None:
    """Runs one call twice on the device: what is wrong, or None."""
    args = _map(call.args, lambda t: _moved(t, device))
    run = getattr(torch.ops.lora_kernels, call.op)
    first, second = (tuple(t.cpu() for t in _tuple(run(*args))) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return "two runs differ"
    return wrong(call, first)


def _moved(t: Tensor, device: str) -> Tensor:
    """On the device without a kernel, at the strides and the offset that it has in its storage."""
    size = t.untyped_storage().nbytes() // t.element_size()
    storage = t.as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def refused(call: Call, device: str) -> str | None:
    """Why this form cannot serve the call, by its plan; None if it can, or takes no form."""
    if call.op != "forward_as":
        return None
    x, weight, a, b, _, seed = (None if t is None else _moved(t, device) for t in call.args[:6])
    try:
        torch.ops.lora_kernels.forward_plan(x, weight, a, b, seed, *call.args[-3:])
    except RuntimeError as why:
        return str(why).strip().partition("\n")[0]
    return None


def _described(call: Call) -> str:
    """The op and its arguments: of a tensor the shape, and how it lies unless that is plain."""
    found = []
    for value in call.args:
        if isinstance(value, Tensor):
            text = str(list(value.shape))
            if not value.is_contiguous() or value.storage_offset():
                text += f" strides {list(value.stride())} offset {value.storage_offset()}"
            found.append(text)
        else:
            found.append(repr(value))
    return f"{call.op}({', '.join(found)})"


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        return skip("torch sees no CUDA device")
    ops = [op for op in OPS if schemas.runs_here(op, device.upper())]
    if not ops:
        return skip(f"no {device} kernels: {schemas.EXTENSION_ERROR or 'not in this build'}")
    checked = failed = not_served = 0
    for op in ops:
        for call in calls(op):
            if (why := refused(call, device)) is not None:
                not_served += 1
                print(f"not served {_described(call)}: {why}")
                continue
            checked += 1
            if (problem := check(call, device)) is not None:
                failed += 1
                print(f"WRONG {_described(call)}: {problem}")
    if not_served:
        print(f"refused {not_served} calls")
    print(f"checked {checked} calls of {', '.join(ops)}: {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.sanitize`: every CUDA kernel once on a few small shapes, for compute-sanitizer.

Only our kernels run on the GPU: operands are made on the CPU and results are compared there, so
that no vendor's kernel is instrumented or blamed. Each call runs twice and must give the same bits.
Masks must equal lora_kernels.dropout.reference_mask; every other result is within rounding of
lora_kernels.composed in float64. Exits with 1 if a result is wrong.
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

OPS = ("dropout_mask", "down_proj", "fused_gemm", "weight_grad", "forward", "backward")
CHAINED = ("forward", "backward")  # they round h and dh on the way
DTYPES = (torch.bfloat16, torch.float16)
# M, N, K, r: one element, ragged everywhere, a multiple of every tile, and more than one tile.
SHAPES = ((1, 8, 8, 1), (17, 40, 72, 3), (128, 128, 128, 16), (145, 264, 328, 24))
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
        yield Call(op, (dy, weight.t(), h, a.t(), None, *drop, SCALE), n + r)
    elif op == "weight_grad":
        for wide in (False, True):
            yield Call(op, (h, x, *drop, SCALE, wide, False), m)
            yield Call(op, (h, dy, None, 0, SCALE, wide, True), m)
    elif op == "forward":
        yield Call(op, (x, weight, a, b, bias, *drop, SCALE, 1.0), k + r)
    elif op == "backward":
        flags = (False, False, True, True, True, True)
        yield Call(op, (dy, x, weight, a, b, h, *drop, SCALE, 1.0, *flags), m + n + r)


def calls(op: str) -> Iterator[Call]:
    torch.manual_seed(0)
    if op == "dropout_mask":
        yield from _masks()
        return
    for dtype in DTYPES:
        for shape in SHAPES:
            for p in DROPOUTS:
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
        worst = ((value.double() - want).abs() / bound).nan_to_num(torch.inf).max().item()
        if worst > 1:
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
    """On the device, with its strides and without a kernel: a transposed t stays transposed."""
    if t.dim() == 2 and t.stride(0) == 1:
        return t.t().contiguous().to(device).t()
    return t.to(device)


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
    ops = [op for op in OPS if schemas.has_kernel(op, device.upper())]
    if not ops:
        return skip(f"no {device} kernels: {schemas.EXTENSION_ERROR or 'not in this build'}")
    checked = failed = 0
    for op in ops:
        for call in calls(op):
            checked += 1
            problem = check(call, device)
            if problem is not None:
                failed += 1
                shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in call.args]
                print(f"WRONG {op}{tuple(shapes)}: {problem}")
    print(f"checked {checked} calls of {', '.join(ops)}: {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

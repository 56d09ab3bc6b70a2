"""`python -m bench.bench_kernels`: each kernel against the same arithmetic in PyTorch's own ops.

The kernels are what torch.ops.lora_kernels.{dropout_mask,down_proj,fused_gemm,weight_grad} runs
on this device. `composed` is lora_kernels.composed: the vendor's GEMMs, the mask by our kernel if
there is one; for dropout_mask itself, plain PyTorch. `frozen` is the vendor's GEMM of fused_gemm
alone, `copy` moves as many bytes as the kernel has operands from memory to memory: `of copy` is its
time over the contender's, about 1 at the memory's limit. On CUDA there is one more: `torch` is the
vendor's GEMM on what F.dropout leaves of x, as a layer without this package computes it. GB/s
counts each operand once. The results of a kernel are compared with composed's before it is timed.
One that this device lacks is left out: the op is `composed` there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from lora_kernels import composed, dropout, schemas

from . import contenders, report, shapes, timing

OPS = torch.ops.lora_kernels
KERNELS = ("dropout_mask", "down_proj", "fused_gemm", "weight_grad")
COLUMNS = {
    "median_ms": ("time ms", report.digits),
    "iqr_ms": ("IQR ms", report.digits),
    "speedup_over_composed": ("vs composed", report.times),
    "tflops": ("FLOP/s", report.flop_rate),
    "gb_per_s": ("GB/s", report.digits),
    "of_copy": ("of copy", report.times),
    "samples": ("n", str),
}


def eager(kernel: str, tensors: tuple[Tensor, ...], scale: float, p: float) -> Tensor:
    """The product that a kernel computes with dropout, with torch's own dropout instead of ours."""
    if kernel == "down_proj":
        x, down = tensors
        return torch.mm(F.dropout(x, p), down.t()).mul_(scale)
    if kernel == "weight_grad":
        h, x = tensors
        return torch.mm(h.t(), F.dropout(x, p)).mul_(scale)
    dy, weight, h, up, _ = tensors
    return torch.mm(dy, weight.t()).add_(F.dropout(torch.mm(h, up.t()), p), alpha=scale)


def copy_of(size: int, device: str) -> Callable[[], object]:
    """Copies on the device, such that `size` bytes are read or written in all."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Job(NamedTuple):
    """One call of a kernel, and what computes the same."""

    kernel: str
    what: str  # it computes
    calls: dict[str, Callable[[], object]]
    flops: int
    bytes: int  # of every operand, once
    frozen_flops: int  # of the frozen GEMM, where the kernel has one


def jobs(case: shapes.Case, problem: contenders.Problem, p: float) -> Iterator[Job]:
    """The calls that one layer's forward and backward pass make."""
    (_, m, n, k), r = case.shape, case.rank
    x, weight, a, b, dy = (t.detach() for t in problem)
    threshold = dropout.drop_threshold(p)
    seed = dropout.draw_seed(x.device) if threshold > 0 else None
    drop = (seed, threshold)
    h, dh = (torch.randn(m, r, dtype=x.dtype, device=x.device) for _ in range(2))

    def job(kernel: str, what: str, tensors: tuple[Tensor, ...], *args, size: int, flops: int):
        calls = {
            "kernel": lambda: getattr(OPS, kernel)(*tensors, *args),
            "composed": lambda: getattr(composed, kernel)(*tensors, *args),
        }
        if x.is_cuda and seed is not None:
            calls["torch"] = lambda: eager(kernel, tensors, args[2], p)
        if kernel == "fused_gemm":
            calls["frozen"] = lambda: torch.mm(tensors[0], tensors[1].t())
        moved = size + sum(t.numel() for t in tensors if t is not None)
        return Job(kernel, what, calls, flops, moved * x.element_size(), 2 * m * n * k)

    if seed is not None:
        calls = {
            "kernel": lambda: OPS.dropout_mask(seed, m, k, threshold),
            "composed": lambda: dropout.reference_mask(seed, m, k, threshold),
            "bernoulli_": lambda: x.new_empty(m, k, dtype=torch.bool).bernoulli_(1 - p),
        }
        yield Job("dropout_mask", "mask", calls, 0, m * k, 0)
    rank_k, rank_n, frozen = 2 * m * k * r, 2 * m * n * r, 2 * m * n * k
    yield job("down_proj", "h", (x, a), *drop, 2.0, size=m * r, flops=rank_k)
    yield job(
        "fused_gemm", "dx", (dy, weight.t(), dh, a.t(), None), *drop, 1.0,
        size=m * k, flops=frozen + rank_k,
    )  # fmt: skip
    yield job("weight_grad", "dA", (dh, x), *drop, 1.0, False, False, size=r * k, flops=rank_k)
    if seed is None:  # these never see the mask
        yield job("down_proj", "dh", (dy, b.t()), *drop, 2.0, size=m * r, flops=rank_n)
        yield job(
            "fused_gemm", "y", (x, weight, h, b, None), *drop, 1.0,
            size=m * n, flops=frozen + rank_n,
        )  # fmt: skip
        yield job(
            "weight_grad", "dB", (h, dy), *drop, 1.0, False, True,
            size=n * r, flops=rank_n,
        )  # fmt: skip


def measure(job: Job, args: argparse.Namespace, timer) -> list[dict]:
    """A row for each contender; the kernel's has an `error` if its result is wrong."""
    calls = dict(job.calls)
    result, expected = calls["kernel"](), calls["composed"]()
    error = contenders.relative_error(result, (expected,))
    bound = contenders.tolerance(expected.dtype) if expected.is_floating_point() else 0.0
    del result, expected
    calls["copy"] = copy_of(job.bytes, args.device)
    for call in calls.values():
        for _ in range(timing.WARM_UP_CALLS[args.device]):
            call()
    measured = timing.interleave(calls, timer, args.rounds, args.seconds)
    rows = []
    for name, summary in measured.items():
        ms, same = summary.median_ms, name not in ("copy", "frozen")
        flops = {"copy": 0, "frozen": job.frozen_flops}.get(name, job.flops)
        rows.append({
            "name": name, **dataclasses.asdict(summary),
            "speedup_over_composed": measured["composed"].median_ms / ms if same else None,
            "tflops": flops / ms * 1e-9 if flops else None,
            "gb_per_s": job.bytes / ms * 1e-6,
            "of_copy": measured["copy"].median_ms / ms,
        })  # fmt: skip
        if name == "kernel":
            rows[-1]["relative_error"] = error
            if not error <= bound:
                rows[-1]["error"] = f"wrong: relative error {error:.1e}, expected <= {bound:.1e}"
    return rows


def named(job: Job, rows: list[dict]) -> list[dict]:
    """The rows of a table of several kernels: ours under the kernel's name, the rest indented."""
    ours = f"{job.kernel} -> {job.what}"
    return [row | {"name": ours if row["name"] == "kernel" else f"  {row['name']}"} for row in rows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_kernels",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel", type=shapes.listed(shapes.one_of("kernel", KERNELS)), default=list(KERNELS),
        metavar="NAME[,NAME]", help=f"of {', '.join(KERNELS)}; default: all",
    )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / "kernels.json")
    return shapes.parse(parser, {"cpu": 0.3, "cuda": 0.25})


@torch.no_grad()
def main() -> int:
    args, console = parse(), Console()
    machine = report.environment(args.device)
    kernels = [name for name in args.kernel if schemas.runs_here(name, args.device.upper())]
    for name in sorted(set(args.kernel) - set(kernels)):
        console.print(f"{name}: no kernel for {args.device} here, the op is composed; left out")
    timer, groups = timing.make_timer(args.device), []
    settings = {"rounds": args.rounds, "seconds_per_table": args.seconds}
    cases = shapes.cases(args)
    with report.progress(console) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=str(case))
            problem = contenders.make_problem(case, args.device)
            for p in args.dropout:
                lines = []
                for job in jobs(case, problem, p):
                    if job.kernel not in kernels:
                        continue
                    rows = measure(job, args, timer)
                    lines += named(job, rows)
                    groups.append({
                        "kernel": job.kernel, "what": job.what, **case.shape._asdict(),
                        "rank": case.rank, "dtype": case.dtype, "dropout": p, "rows": rows,
                    })  # fmt: skip
                console.print(report.table(f"{case}  dropout {p:g}", lines, COLUMNS))
                report.write(args.json, "kernels", machine, settings, {"groups": groups})
            bar.advance(task)
    failures = [
        f"{group['kernel']} -> {group['what']}, {group['label']}: {row['error']}"
        for group in groups
        for row in group["rows"]
        if "error" in row
    ]
    content = {"groups": groups, "failures": failures}
    return report.finish(console, args.json, "kernels", machine, settings, content)


if __name__ == "__main__":
    sys.exit(main())

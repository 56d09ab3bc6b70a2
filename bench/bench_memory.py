"""`python -m bench.bench_memory`: what one LoRA linear layer keeps and needs of memory in a step.

`saved` is the storage that autograd holds between forward and backward, each counted once, without
the parameters and x, which are alive anyway. `peak` is the most that forward and backward hold at a
time of tensors beyond their inputs, the gradients of x, A and B included; on a CPU it is left out
for 16 bits, whose backward pass may take minutes there. lora.Linear is PEFT's own layer, with
adapters of x's dtype, and with fp32 ones, which it makes unless told otherwise; `eager` is its
formula, `addmm` the same with two passes less; * marks what fused_lora_linear picks by itself.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch
from rich.console import Console
from torch import Tensor, nn

import lora_kernels as lk

from . import contenders, report, shapes, timing

MIB = 2**20
TOKENS = {"cpu": 64, "cuda": 8192}  # saved bytes grow by the row, and no other way
COLUMNS = {
    "saved_mib": ("saved MiB", report.digits),
    "saved_per_row": ("bytes/row", report.digits),
    "peak_mib": ("peak MiB", report.digits),
}


def saved_bytes(call, known: tuple[Tensor, ...]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of call(), `known` left out.

    The graph is alive until all are counted: no address can be reused meanwhile.
    """
    left_out = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    total = sum(kept.values())
    del y
    return total


def peft_layer(problem: contenders.Problem, p: float, dtype: torch.dtype) -> nn.Module | None:
    """PEFT's layer on the problem's weight, with its A and B in `dtype`; None without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    n, k = problem.weight.shape
    r = problem.lora_a.shape[0]
    base = nn.Linear(k, n, bias=False, device="meta")
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    alpha = contenders.SCALING * r
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=p, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    for module, value in ((layer.lora_A, problem.lora_a), (layer.lora_B, problem.lora_b)):
        module["default"].weight = nn.Parameter(value.detach().to(dtype))
    return layer.train()


def layers(
    problem: contenders.Problem, p: float, named: list[str] | None = None
) -> dict[str, contenders.Contender]:
    """What is compared, by name, ours last: the `named` backends, or all that serve."""
    found = {}
    for name, dtype in (("lora.Linear", problem.x.dtype), ("lora.Linear fp32", torch.float32)):
        layer = peft_layer(problem, p, dtype)
        if layer is not None and (name == "lora.Linear" or dtype != problem.x.dtype):
            adapter = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            call = functools.partial(layer, problem.x)
            found[name] = contenders.Contender(call, (problem.x, *adapter))
    backends = contenders.chosen_backends(problem, named, False)
    others = contenders.make_contenders(problem, p, backends, {"peft_fp32", "compiled"})
    frozen, eager = others.pop("frozen"), others.pop("peft")
    return {"frozen": frozen, **found, "eager": eager, **others}


def measure(
    problem: contenders.Problem, p: float, device: str, named: list[str] | None = None
) -> list[dict]:
    """A row for each contender."""
    rows, chosen = [], contenders.automatic(problem)
    for name, layer in layers(problem, p, named).items():
        known = (*layer.inputs, problem.weight)
        saved = saved_bytes(layer.forward, known)
        rows.append({
            "name": name, "automatic": name == chosen, "saved_bytes": saved,
            "saved_mib": saved / MIB, "saved_per_row": saved / problem.x.shape[0],
        })  # fmt: skip
        if device == "cuda" or problem.x.dtype == torch.float32:
            step = layer.call("fwd+bwd", problem.dy)
            step()  # the first one makes the workspaces of the vendor's library
            peak = timing.peak_extra_bytes(step, device)
            rows[-1] |= {"peak_bytes": peak, "peak_mib": peak / MIB}
    return rows


def default_cases(device: str, rank: int) -> list[shapes.Case]:
    """Every preset in bf16; on the CPU also what `make bench` has in fp32."""

    def cases(name: str, m: int, dtype: str) -> list[shapes.Case]:
        found = shapes.preset(name).items()
        return [shapes.Case(shapes.Shape(label, m, *nk), dtype, rank) for label, nk in found]

    wide = [case for name in shapes.MODELS for case in cases(name, TOKENS[device], "bf16")]
    timed = shapes.default_cases(device, rank)
    return wide + [case for case in timed if case.dtype == "fp32"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_memory",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend", type=shapes.listed(shapes.one_of("backend", lk.backends())),
        metavar="NAME[,NAME]", help="of ours, only these; default: all that can run here",
    )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / "memory.json")
    return shapes.parse(parser, {"cpu": 1.0, "cuda": 1.0})


def main() -> int:
    args, console = parse(), Console()
    machine = report.environment(args.device)
    if machine["peft"] is None:
        console.print("peft is not installed (pip install peft): no lora.Linear")
    groups, settings = [], {"scaling": contenders.SCALING, "x_requires_grad": True}
    cases = shapes.cases(args, default_cases)
    with report.progress(console) as bar:
        task = bar.add_task("", total=len(cases) * len(args.dropout))
        for case in cases:
            bar.update(task, description=str(case))
            problem = contenders.make_problem(case, args.device)
            for p in args.dropout:
                rows = measure(problem, p, args.device, args.backend)
                console.print(report.table(f"{case}  dropout {p:g}", rows, COLUMNS))
                groups.append({
                    **case.shape._asdict(), "rank": case.rank, "dtype": case.dtype, "dropout": p,
                    "rows": rows,
                })  # fmt: skip
                bar.advance(task)
            report.write(args.json, "memory", machine, settings, {"groups": groups})
    console.print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.bench_group`: projections that share x, in one call against a call each.

  frozen      the frozen linears alone: F.linear, one after the other
  eager       PEFT's formula, one after the other
  NAME apart  fused_lora_linear of the backend NAME, one after the other
  NAME group  fused_lora_linear_group of that backend

`over frozen` is time over that of frozen, `of apart` over that of the same backend's separate
calls. The outputs of a group are compared with those of separate calls, bit for bit, and its
gradients within half of the dtype's digits, before they are timed; a wrong one is an error and not
timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import lora_kernels as lk
from lora_kernels import dropout

from . import bench_gemm, contenders, report, shapes, timing
from .shapes import Case, Shape

MEMBERS = {"q, k, v": ("q", "k", "v"), "gate, up": ("gate", "up")}
SECONDS = {"cpu": 0.6, "cuda": 0.4}
COLUMNS = {
    "median_ms": ("time ms", report.digits),
    "iqr_ms": ("IQR ms", report.digits),
    "over_frozen": ("over frozen", bench_gemm.ratio),
    "of_apart": ("of apart", bench_gemm.ratio),
    "samples": ("n", str),
}


def groups_of(model: str, rows: int) -> dict[str, list[Shape]]:
    """The shapes of a model's projections that share an input, by the group's name."""
    layers = shapes.MODELS[model]

    def shape(name: str) -> Shape | None:
        found = [nk for label, nk in layers.items() if name in label.split("/")]
        return Shape(name, rows, *found[0]) if found else None

    every = {group: [shape(name) for name in names] for group, names in MEMBERS.items()}
    return {
        f"{model} {group}": [s for s in members if s is not None]
        for group, members in every.items()
        if None not in members
    }


class Group:
    """Operands of projections with one x, and the ways to run them."""

    def __init__(self, members: Sequence[Shape], dtype: str, rank: int, p: float, device: str):
        problems = [contenders.make_problem(Case(s, dtype, rank), device) for s in members]
        self.x, self.p = problems[0].x, p
        self.weights, self.lora_as, self.lora_bs, self.dys = (
            [getattr(problem, name) for problem in problems]
            for name in ("weight", "lora_a", "lora_b", "dy")
        )
        drops = dropout.drop_threshold(p) > 0
        self.seeds = [dropout.draw_seed(self.x.device) if drops else None for _ in members]

    def frozen(self) -> list[Tensor]:
        return [F.linear(self.x, weight) for weight in self.weights]

    def eager(self) -> list[Tensor]:
        each = zip(self.weights, self.lora_as, self.lora_bs, strict=True)
        return [contenders.peft_formula(self.x, *one, self.p) for one in each]

    def apart(self, backend: str) -> list[Tensor]:
        each = zip(self.weights, self.lora_as, self.lora_bs, self.seeds, strict=True)
        return [
            lk.fused_lora_linear(
                self.x, weight, a, b, scaling=contenders.SCALING, dropout_p=self.p, seed=seed,
                backend=backend,
            )
            for weight, a, b, seed in each
        ]  # fmt: skip

    def group(self, backend: str) -> list[Tensor]:
        return lk.fused_lora_linear_group(
            self.x, self.weights, self.lora_as, self.lora_bs, scalings=contenders.SCALING,
            dropout_p=self.p, seeds=self.seeds, backend=backend,
        )  # fmt: skip

    def call(self, forward: Callable[[], list[Tensor]], mode: str) -> Callable[[], Sequence]:
        if mode == "forward":
            return forward
        adapters = [] if forward == self.frozen else [*self.lora_as, *self.lora_bs]
        return lambda: torch.autograd.grad(forward(), [self.x, *adapters], self.dys)

    def backends(self, named: list[str] | None) -> list[str]:
        problem = contenders.Problem(
            self.x, self.weights[0], self.lora_as[0], self.lora_bs[0], self.dys[0]
        )
        return contenders.chosen_backends(problem, named, False)

    def wrong(self, backend: str) -> str | None:
        """None, or in what the group differs from separate calls."""
        ys, alone = self.group(backend), self.apart(backend)
        if not all(map(torch.equal, ys, alone)):
            return "wrong: y differs from that of separate calls"
        inputs = [self.x, *self.lora_as, *self.lora_bs]
        found, exact = (torch.autograd.grad(out, inputs, self.dys) for out in (ys, alone))
        error, bound = contenders.relative_error(found, exact), contenders.tolerance(self.x.dtype)
        if not error <= bound:
            return f"wrong: relative error {error:.1e} of a gradient, expected <= {bound:.1e}"
        return None


def measure(group: Group, mode: str, args: argparse.Namespace, timer) -> list[dict]:
    """A row for each contender."""
    forwards: dict[str, Callable] = {"frozen": group.frozen, "eager": group.eager}
    rows: dict[str, dict] = {}
    for backend in group.backends(args.backend):
        forwards[f"{backend} apart"] = functools.partial(group.apart, backend)
        name = f"{backend} group"
        if (why := group.wrong(backend)) is None:
            forwards[name] = functools.partial(group.group, backend)
        else:
            rows[name] = {"name": name, "error": why}
    calls = {name: group.call(forward, mode) for name, forward in forwards.items()}
    for call in calls.values():
        for _ in range(timing.WARM_UP_CALLS[args.device]):
            call()
    measured = timing.interleave(calls, timer, args.rounds, args.seconds)
    for name, summary in measured.items():
        ms, apart = summary.median_ms, measured.get(name.replace(" group", " apart"))
        rows[name] = {
            "name": name, **dataclasses.asdict(summary),
            "over_frozen": ms / measured["frozen"].median_ms,
            "of_apart": ms / apart.median_ms if apart and name.endswith(" group") else None,
        }  # fmt: skip
    return list(rows.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_group",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=shapes.listed(shapes.one_of("model", shapes.MODELS)), metavar="NAME[,NAME]",
        help=f"of {', '.join(shapes.MODELS)}; default llama-3.1-8b on CUDA, minilm on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--backend", type=shapes.listed(shapes.one_of("backend", lk.backends())),
        metavar="NAME[,NAME]", help="default: all of our backends that serve the groups",
    )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / "group.json")
    args = shapes.parse(parser, SECONDS)
    if args.preset or args.shape:
        parser.error("--preset and --shape name single layers; take --model")
    return args


def main() -> int:
    args, console = parse(), Console()
    cuda = args.device == "cuda"
    models = args.model or (["llama-3.1-8b"] if cuda else ["minilm"])
    dtypes = args.dtype or (["bf16"] if cuda else ["fp32"])
    machine, timer, tables = report.environment(args.device), timing.make_timer(args.device), []
    settings = {
        "rounds": args.rounds, "seconds_per_table": args.seconds, "scaling": contenders.SCALING,
    }  # fmt: skip
    cases = [
        (label, members, dtype, rank, p)
        for model in models
        for rows in args.tokens
        for label, members in groups_of(model, rows).items()
        for dtype in dtypes
        for rank in args.rank
        for p in args.dropout
    ]
    for label, members, dtype, rank, p in cases:
        group = Group(members, dtype, rank, p, args.device)
        for mode in contenders.MODES:
            rows = measure(group, mode, args, timer)
            title = f"{label}  M={members[0].m} r={rank} {dtype} dropout {p:g} {mode}"
            console.print(report.table(title, rows, COLUMNS))
            tables.append({
                "label": label, "members": [s._asdict() for s in members], "dtype": dtype,
                "rank": rank, "dropout": p, "mode": mode, "rows": rows,
            })  # fmt: skip
        report.write(args.json, "group", machine, settings, {"groups": tables})
    failures = report.failures(tables, lambda table: f"{table['label']} p={table['dropout']:g}")
    return report.finish(
        console, args.json, "group", machine, settings, {"groups": tables, "failures": failures}
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.bench_gemm`: how far our GEMM is from the vendor's, and what LoRA adds to it.

Each table is one layer, rank and dropout, the forward pass alone; its contenders run interleaved.

  vendor        the frozen linear, torch.mm into a buffer that exists: cuBLAS on CUDA
  plain         our kernel without LoRA: rank 0
  one_launch    our kernel with LoRA, the down projection inside of it
  two_launches  our down projection, then our kernel, which adds the up projection
  addmm         lora_kernels.composed: the vendor's GEMMs, the up projection accumulated in place
  eager         PEFT's formula

`over plain` is what is added to its time, `by the model` what the plan expects of that; `over
vendor` is time over its. FLOP/s counts the frozen GEMM alone, so that rows compare. Results of ours
are compared with composed's before they are timed; a wrong one is an error and not timed. What
cannot serve a call is left out, with the reason. On a CPU, and where our kernels are not built,
vendor, addmm and eager remain.
--tile-n and --group time ours once for each pair, and `over plain` is over the plain of that pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console

from lora_kernels import composed, dropout, schemas

from . import contenders, report, shapes, timing
from .shapes import Case, Shape

OPS = torch.ops.lora_kernels
FORMS = ("one_launch", "two_launches")
OURS = ("plain", *FORMS)
RANKS = "8,16,32,64,128"
# Rows of x -> (N, K). In tiles of 128 x 256, alone or two under one another, 8448 rows of these N
# fill 132 multiprocessors a whole number of times; 8192 rows do not.
LAYERS = {
    8448: ((4096, 4096), (14336, 4096)),
    8192: ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (1024, 4096)),
}
SECONDS = {"cpu": 0.3, "cuda": 0.2}
RATIOS = ("over_plain", "predicted_over_plain", "over_vendor")  # of a row, where it has them
_PREDICTED = re.compile(r"([\d.]+) % over the frozen GEMM")


def ratio(value: float) -> str:
    return f"{value:.3f}x"


def percent(value: float) -> str:
    return f"{100 * (value - 1):+.1f} %"


COLUMNS = {
    "median_ms": ("time ms", report.digits),
    "iqr_ms": ("IQR ms", report.digits),
    "tflops": ("FLOP/s", report.flop_rate),
    "over_plain": ("over plain", percent),
    "predicted_over_plain": ("by the model", percent),
    "over_vendor": ("over vendor", ratio),
    "samples": ("n", str),
}


def built(device: str, ops: tuple[str, ...] = ("forward_as", "forward_plan")) -> bool:
    """Whether this device has kernels for all of these."""
    return all(schemas.runs_here(op, device.upper()) for op in ops)


def default_cases(device: str, rank: int) -> list[Case]:
    """CUDA: LAYERS. CPU: MiniLM's layers, so that everything but the speed can be tried."""
    if device == "cpu":
        layers = shapes.preset("minilm").items()
        return [Case(Shape(label, 256, *nk), "fp32", rank) for label, nk in layers]
    return [
        Case(Shape(f"{n}x{k}", m, n, k), "bf16", rank)
        for m, layers in LAYERS.items()
        for n, k in layers
    ]


class Ours(NamedTuple):
    """One way to call an op of ours."""

    name: str
    call: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
    plan: Callable[[], str]  # what it launches; raises RuntimeError where it cannot serve the call
    exact: str  # which of `Layer.exact` it computes
    part: bool = False  # of a call whose plan it has


def suffix(tile_n: int, group: int) -> str:
    """Of the name of what is called with these."""
    given = {"tile_n": tile_n, "group": group}
    return "".join(f" {key}={value}" for key, value in given.items() if value > 0)


class Layer:
    """One layer's operands at one dropout."""

    FORMS = FORMS  # of ours
    COLUMNS = COLUMNS

    def __init__(self, problem: contenders.Problem, p: float):
        self.x, self.weight, self.a, self.b, _ = (t.detach() for t in problem)
        self.p, self.threshold = p, dropout.drop_threshold(p)
        self.seed = dropout.draw_seed(self.x.device) if self.threshold > 0 else None
        self.out = self.x.new_empty(self.x.shape[0], self.weight.shape[0])

    def vendor(self) -> torch.Tensor:
        return torch.mm(self.x, self.weight.t(), out=self.out)

    def _lora(self) -> tuple:
        drop = (self.seed, self.threshold)
        return (self.x, self.weight, self.a, self.b, None, *drop, contenders.SCALING, 1.0)

    def _frozen(self) -> tuple:
        return (self.x, self.weight, self.a[:0], self.b[:, :0], None, None, 0, 1.0, 1.0)

    def others(self) -> dict[str, Callable]:
        """What is neither ours nor the vendor's GEMM."""
        return {"addmm": self.addmm, "eager": self.eager}

    def exact(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """What ours are compared with."""
        return {"frozen": (self.vendor(),), "lora": self.addmm()}

    def addmm(self) -> tuple[torch.Tensor, torch.Tensor]:
        return composed.forward(*self._lora())

    def eager(self) -> torch.Tensor:
        return contenders.peft_formula(self.x, self.weight, self.a, self.b, self.p)

    def ours(self, tile_n: int, group: int) -> Iterator[Ours]:
        """`plain` and what it is compared with; 0 leaves tile_n or group to the kernel."""
        for form in ("", *self.FORMS):
            operands = self._lora if form else self._frozen
            how = (form, tile_n, group)
            x, w, a, b, _, seed, *_ = operands()
            yield Ours(
                (form or "plain") + suffix(tile_n, group),
                functools.partial(self._call, operands, *how),
                functools.partial(OPS.forward_plan, x, w, a, b, seed, *how),
                "lora" if form else "frozen",
            )

    @staticmethod
    def _call(operands: Callable[[], tuple], *how) -> tuple[torch.Tensor, torch.Tensor]:
        return OPS.forward_as(*operands(), *how)


def planned(plan: str) -> dict:
    """What a row has of its plan."""
    found = _PREDICTED.search(plan)
    more = {"predicted_over_plain": 1 + float(found[1]) / 100} if found else {}
    return {"plan": plan, **more}


def verify(ours: Ours, exact: tuple[torch.Tensor, ...]) -> dict:
    """The relative_error of one call, and an `error` if it failed or is wrong."""
    try:
        result = ours.call()
    except RuntimeError as error:  # its plan promised that it can
        return {"error": f"failed: {first_line(error)}"}
    results = (result,) if isinstance(result, torch.Tensor) else result
    made = tuple(t for t in results if t.numel())  # h has no elements without LoRA
    error = contenders.relative_error(made, exact)
    bound = contenders.tolerance(exact[0].dtype)
    if not error <= bound:
        why = f"wrong: relative error {error:.1e}, expected <= {bound:.1e}"
        return {"relative_error": error, "error": why}
    return {"relative_error": error}


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def measure(case: Case, layer: Layer, args: argparse.Namespace, timer) -> dict:
    """One table: what can serve this call, verified and timed."""
    rows: dict[str, dict] = {"vendor": {}}
    calls: dict[str, Callable] = {"vendor": layer.vendor}
    left_out = {}
    exact = layer.exact()
    for tile_n, group in args.configs:
        for ours in layer.ours(tile_n, group):
            if ours.name in rows or ours.name in left_out:
                continue  # a part, which has no tile of its own
            try:
                plan = ours.plan()
            except RuntimeError as why:
                left_out[ours.name] = first_line(why)
                continue
            rows[ours.name] = {} if ours.part else planned(plan)
            rows[ours.name] |= verify(ours, exact[ours.exact])
            if "error" not in rows[ours.name]:
                calls[ours.name] = ours.call
    del exact
    calls |= layer.others()
    for call in calls.values():
        for _ in range(timing.WARM_UP_CALLS[args.device]):
            call()
    measured = timing.interleave(calls, timer, args.rounds, args.seconds)
    flops, _ = shapes.flops(case, "forward")
    weight_bytes = layer.weight.numel() * layer.weight.element_size()
    for name, summary in measured.items():
        row = rows.setdefault(name, {})
        row |= dataclasses.asdict(summary) | {"tflops": flops / summary.median_ms * 1e-9}
        row["weight_gb_per_s"] = weight_bytes / summary.median_ms * 1e-6
        plain = measured.get(" ".join(["plain", *name.split(" ")[1:]]))
        row["over_plain"] = summary.median_ms / plain.median_ms if plain else None
        row["over_vendor"] = summary.median_ms / measured["vendor"].median_ms
    found = [{"name": name} | row for name, row in rows.items()]
    return {
        **case.shape._asdict(), "rank": case.rank, "dtype": case.dtype, "dropout": layer.p,
        "left_out": left_out, "rows": found,
    }  # fmt: skip


def faster(table: dict) -> dict | None:
    """Of a table, the row of the form with LoRA that took less time."""
    found = [row for row in table["rows"] if row["name"] in FORMS and row.get("over_plain")]
    return min(found, key=lambda row: row["over_plain"], default=None)


def summarise(groups: list[dict]) -> list[dict]:
    """Geometric means over layers, by contender, rank and dropout."""
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        for row in group["rows"]:
            for key in RATIOS:
                if row.get(key) is not None:
                    found[row["name"], group["rank"], group["dropout"]][key].append(row[key])
    return [
        {"name": name, "rank": rank, "dropout": p, "tables": max(map(len, ratios.values()))}
        | {key: report.geometric_mean(values) for key, values in ratios.items()}
        for (name, rank, p), ratios in sorted(found.items())
        if name != "vendor"
    ]


def show(
    console: Console, case: Case, group: dict, said: set[tuple[str, str]], columns: dict
) -> None:
    """One table, and under it the plans; why something is left out is said once."""
    say = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    console.print(report.table(f"{case}  dropout {group['dropout']:g}", group["rows"], columns))
    for row in group["rows"]:
        if "plan" in row:
            say(f"{row['name']}: {row['plan']}", style="dim")
    for name, why in group["left_out"].items():
        if (name, why) not in said:
            said.add((name, why))
            say(f"{name}: left out: {why}", style="yellow")


def parse(name: str, doc: str, ranks: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.bench_{name}",
        description=doc.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, example in (("--tile-n", "128,192,256"), ("--group", "4,8,16")):
        parser.add_argument(
            flag, type=shapes.listed(shapes.positive_int), default=[0], metavar="SIZE[,SIZE]",
            help=f"of our kernel, such as {example}; default: its own choice",
        )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / f"{name}.json")
    args = shapes.parse(parser, SECONDS, ranks=ranks)
    args.configs = list(itertools.product(args.tile_n, args.group))
    return args


def run(
    name: str,
    args: argparse.Namespace,
    served: bool,
    layer: type[Layer],
    default: Callable[[str, int], list[Case]] = default_cases,
) -> int:
    """Measures every case, each at every dropout; ours only if `served`. The exit code."""
    console, machine = Console(), report.environment(args.device)
    if not served:
        console.print(f"our kernels are not built for {args.device} or do not run here; left out")
        args.configs = []
    timer, groups, said = timing.make_timer(args.device), [], set()
    settings = {
        "rounds": args.rounds, "seconds_per_table": args.seconds, "scaling": contenders.SCALING,
        "tile_n": args.tile_n, "group": args.group,
        "warm_up_calls": timing.WARM_UP_CALLS[args.device],
    }  # fmt: skip
    cases = shapes.cases(args, default)
    with report.progress(console) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=str(case))
            problem = contenders.make_problem(case, args.device)
            for p in args.dropout:
                groups.append(measure(case, layer(problem, p), args, timer))
                show(console, case, groups[-1], said, layer.COLUMNS)
            report.write(args.json, name, machine, settings, {"groups": groups})
            bar.advance(task)
    summary = summarise(groups)
    head = {"rank": ("rank", str), "dropout": ("dropout", "{:g}".format), "tables": ("tables", str)}
    means = {key: column for key, column in COLUMNS.items() if key in RATIOS}
    console.print(report.table("geometric mean over layers", summary, head | means))
    failures = report.failures(
        groups, lambda table: "{label} M={m} r={rank} p={dropout:g}".format(**table)
    )
    content = {"groups": groups, "summary": summary, "failures": failures}
    return report.finish(console, args.json, name, machine, settings, content)


@torch.no_grad()
def main() -> int:
    args = parse("gemm", __doc__, RANKS)
    return run("gemm", args, built(args.device), Layer)


if __name__ == "__main__":
    sys.exit(main())

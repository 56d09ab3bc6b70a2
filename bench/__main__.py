"""`python -m bench`: a LoRA linear layer, forward and backward, against every usual way to run it.

Each table is one layer, dtype, mode and dropout; its contenders run interleaved in this process.
Time is the median with the interquartile range over n calls. `x frozen` is time over that of the
frozen F.linear (with dx alone in the backward pass: the floor), `vs peft` is PEFT's time over the
contender's; * marks what fused_lora_linear picks by itself. peft_fp32 has fp32 adapters and casts x
to them, as PEFT does unless told otherwise; all others have adapters of x's dtype. FLOP/s counts
the frozen and the LoRA GEMMs. `peak MiB` is the most that one call holds of tensors beyond its
inputs. At p = 0 every result is compared with lora_kernels.reference before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table

import lora_kernels as lk

from . import contenders, report, shapes, timing

COLUMNS = {
    "median_ms": ("time ms", report.digits),
    "iqr_ms": ("IQR ms", report.digits),
    "ratio_to_frozen": ("x frozen", report.times),
    "speedup_over_peft": ("vs peft", report.times),
    "tflops": ("FLOP/s", report.flop_rate),
    "peak_extra_mib": ("peak MiB", report.digits),
    "samples": ("n", str),
}
SECONDS = {"cpu": 3.0, "cuda": 0.75}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--mode", type=shapes.listed(shapes.one_of("mode", contenders.MODES)),
        default=",".join(contenders.MODES), metavar="MODE[,MODE]", help="default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--backend", type=shapes.listed(shapes.one_of("backend", lk.backends())),
        metavar="NAME[,NAME]", help="of ours, time only these; default: all that can run here",
    )  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="time backend reference as well")
    parser.add_argument(
        "--skip", type=shapes.listed(shapes.one_of("baseline", contenders.BASELINES[1:])),
        metavar="NAME[,NAME]", default=[],
        help=f"leave out baselines, of {', '.join(contenders.BASELINES[1:])}",
    )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / "layers.json")
    parser.add_argument("--plot", type=report.output_path, default=report.OUT / "layers.png")
    parser.add_argument("--list", action="store_true", help="show presets and backends, and stop")
    args = shapes.parse(parser, SECONDS)
    for name in args.backend or []:
        if (missing := lk.backends()[name]) is not None:
            parser.error(f"argument --backend: {name!r} cannot run here: {missing}")
    return args


def show_choices(console: Console) -> None:
    presets = Table("preset", "N = out_features", "K = in_features", title="Presets")
    for model, layers in shapes.MODELS.items():
        for layer, (n, k) in layers.items():
            presets.add_row(f"{model}:{layer}", str(n), str(k))
    backends = Table("backend", "here", title="Backends")
    for name, missing in lk.backends().items():
        backends.add_row(name, missing or "usable")
    console.print(presets, backends)


class Run:
    """One invocation: its settings, and the tables so far."""

    def __init__(self, args: argparse.Namespace, console: Console):
        self.args, self.console = args, console
        self.timer = timing.make_timer(args.device)
        self.groups: list[dict] = []
        self.failures: list[str] = []

    def case(self, case: shapes.Case, advance) -> None:
        """Every mode and dropout of one case; calls `advance` after each table."""
        problem = contenders.make_problem(case, self.args.device)
        backends = contenders.chosen_backends(problem, self.args.backend, self.args.reference)
        for p in self.args.dropout:
            found = contenders.make_contenders(problem, p, backends, set(self.args.skip))
            for mode in self.args.mode:
                self.group(case, problem, found, mode, p)
                advance()

    def group(self, case, problem, found, mode: str, p: float) -> None:
        """One table: warm up and check each contender, time them in turns, then measure memory."""
        calls, rows = {}, {}
        exact = contenders.expected(problem, mode) if p == 0 else None
        for name, contender in found.items():
            call = contender.call(mode, problem.dy)
            rows[name] = {"name": name}
            try:
                rows[name] |= self._warm_up(name, call, exact, problem.x.dtype)
            except Exception as error:  # a contender that cannot run is reported, not fatal
                if name == "frozen":
                    raise
                rows[name]["error"] = f"left out: {str(error).strip().splitlines()[0]}"
                if name in lk.backends():
                    self.failures.append(f"{name}, {case}, {mode}, p={p}: {error}")
                continue
            calls[name] = call
        exact = None
        measured = timing.interleave(calls, self.timer, self.args.rounds, self.args.seconds)
        for name, call in calls.items():
            peak = timing.peak_extra_bytes(call, self.args.device)
            rows[name] |= dataclasses.asdict(measured[name]) | {"peak_extra_mib": peak / 2**20}
        self._finish(case, mode, p, list(rows.values()), contenders.automatic(problem, p))

    def _warm_up(self, name: str, call, exact, dtype: torch.dtype) -> dict:
        for _ in range(timing.WARM_UP_CALLS[self.args.device]):
            result = call()
        if exact is None or name == "frozen":
            return {}
        error, bound = contenders.relative_error(result, exact), contenders.tolerance(dtype)
        if not error <= bound:
            raise RuntimeError(f"wrong result: relative error {error:.1e}, expected <= {bound:.1e}")
        return {"relative_error": error}

    def _finish(self, case: shapes.Case, mode: str, p: float, rows: list[dict], auto: str) -> None:
        by_name = {row["name"]: row for row in rows}
        frozen_flops, all_flops = shapes.flops(case, mode)
        peft = by_name.get("peft", {}).get("median_ms")
        for row in rows:
            row["automatic"] = row["name"] == auto
            if (ms := row.get("median_ms")) is None:
                continue
            flops = frozen_flops if row["name"] == "frozen" else all_flops
            row["tflops"] = flops / ms * 1e-9
            row["ratio_to_frozen"] = ms / by_name["frozen"]["median_ms"]
            row["speedup_over_peft"] = peft / ms if peft else None
        label, m, n, k = case.shape
        self.groups.append(
            dict(label=label, m=m, n=n, k=k, rank=case.rank, dtype=case.dtype, mode=mode, dropout=p,
                 automatic=auto, rows=rows)
        )  # fmt: skip
        title = f"{case}  {mode}  dropout {p:g}"
        self.console.print(report.table(title, rows, COLUMNS))


def summarise(groups: list[dict]) -> list[dict]:
    """Geometric means over layers of the automatic choice's speed-up, by dtype and dropout."""
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        medians = {row["name"]: row.get("median_ms") for row in group["rows"]}
        ours = medians.get(group["automatic"])
        if group["mode"] != "fwd+bwd" or ours is None:
            continue
        for key in (f"{group['dtype']}, dropout {group['dropout']:g}", "all"):
            for name in contenders.BASELINES:
                if medians.get(name):
                    ratios[key][name].append(medians[name] / ours)
    rows = []
    for key, found in sorted(ratios.items(), key=lambda item: item[0] == "all"):
        means = {f"over_{name}": report.geometric_mean(r) for name, r in found.items()}
        rows.append({"name": key, "tables": len(found["frozen"])} | means)
    return rows


def main() -> int:
    args = parse()
    console = Console()
    if args.list:
        show_choices(console)
        return 0
    machine = report.environment(args.device)
    torch.manual_seed(0)
    cases = shapes.cases(args)
    run = Run(args, console)
    settings = {
        "rounds": args.rounds, "seconds_per_table": args.seconds, "skipped": args.skip,
        "scaling": contenders.SCALING, "warm_up_calls": timing.WARM_UP_CALLS[args.device],
        "minimum_samples": timing.MINIMUM_SAMPLES, "x_requires_grad": True,
    }  # fmt: skip
    tables = len(args.mode) * len(args.dropout)
    with report.progress(console) as bar:
        task = bar.add_task("", total=len(cases) * tables)
        for case in cases:
            bar.update(task, description=str(case))
            run.case(case, lambda: bar.advance(task))
            so_far = {"groups": run.groups, "failures": run.failures}
            report.write(args.json, "layers", machine, settings, so_far)

    summary = summarise(run.groups)
    columns = {f"over_{name}": (name, report.times) for name in contenders.BASELINES}
    title = "fwd+bwd: geometric mean over layers of the speed-up of our automatic choice (*) over"
    if summary:
        console.print(report.table(title, summary, {"tables": ("tables", str)} | columns))
    content = {"groups": run.groups, "summary": summary, "failures": run.failures}
    report.plot(args.plot, run.groups, machine)
    console.print(f"wrote {args.plot}")
    return report.finish(console, args.json, "layers", machine, settings, content)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.tune_triton`: measures the tile plans of the Triton kernels on this GPU.

Writes lora_kernels/triton_kernels/configs.json anew, the rows of this device's family alone and
with the edges they have; rows for elements that are loaded one by one stay. From its present plan a
row goes field by field to the plan that is faster in the geometric mean over the row's shapes and
both passes, in medians of interleaved runs. What is within 2 % of the plan before it does not count
as faster, so a second run leaves the table as it is. A plan is timed only if it is right and fits
into the shared memory of every device of the family; else a line says why not. float32 is measured
with TF32 off.

Evidence that was measured with the table before it lapses: run the selfcheck again afterwards. A
commit that is named with -dirty had other changes; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from lora_kernels.triton_kernels import configs, device, digest
from lora_kernels.triton_kernels.configs import Config, plan_of

from . import provenance, report, shapes, timing

TIE = 0.98  # of the best plan's time, above which another is no better
HOPELESS = 1.25  # times the best plan's time so far, beyond which a plan is not timed further
ROUNDS, SECONDS = 20, 0.2  # most samples of a plan in one call, and in which time they must fit
WIDTHS = {"16": (torch.bfloat16, torch.float16), "32": (torch.float32,)}  # the first that serves


class CannotRun(Exception):
    """Nothing was measured; the message says why and what to do."""


# ---- the table -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """Of the table: what is measured at once."""

    kernel: str
    width: str
    number: int
    low: int  # holds sizes above it
    up_to: int | None

    def __str__(self) -> str:
        size = "M" if self.kernel == "fused_gemm" else "r"
        held = f"{size} > {self.low}" if self.up_to is None else f"{size} <= {self.up_to}"
        return f"{self.kernel} {self.width} {held}"


def rows_of(table: dict[str, Any], family: str, kernels: list[str]) -> list[Row]:
    """Those that are measured, in the table's order."""
    found = []
    for kernel in kernels:
        for width in WIDTHS:
            edges = [row["up_to"] for row in table[kernel][family][width]]
            lows = [0, *edges][: len(edges)]
            found += [
                Row(kernel, width, i, low, up_to)
                for i, (low, up_to) in enumerate(zip(lows, edges, strict=True))
            ]
    return found


def tuned(
    table: dict[str, Any], family: str, chosen: dict[Row, Config], origin: str
) -> dict[str, Any]:
    """The table with other plans in these rows of one family, and word of where they come from."""
    table = json.loads(json.dumps(table))
    for row, config in chosen.items():
        entry = table[row.kernel][family][row.width][row.number]
        entry.update({name: getattr(config, name) for name in entry if name != "up_to"})
    table["origin"][family] = origin
    return table


def dump(table: dict[str, Any]) -> str:
    """configs.json: a plan a line."""

    def block(content: dict[str, str], depth: int, ends: str = "{}") -> str:
        pad = "\n" + " " * depth
        lines = [f"{json.dumps(name)}: {text}" if name else text for name, text in content.items()]
        return ends[0] + pad + f",{pad}".join(lines) + pad[:-1] + ends[1]

    def rows(found: list[dict[str, Any]]) -> str:
        lines = ",\n".join(f"    {json.dumps(row)}" for row in found)
        return f"[\n{lines}\n   ]" if found else "[]"

    parts = {"schema": json.dumps(table["schema"])}
    parts["origin"] = block({name: json.dumps(text) for name, text in table["origin"].items()}, 2)
    for kernel in configs.KERNELS:
        families = {
            family: block({width: rows(found) for width, found in widths.items()}, 3)
            for family, widths in table[kernel].items()
        }
        parts[kernel] = block(families, 2)
    return block(parts, 1) + "\n"


def origin(machine: dict[str, Any], rest: list[Row], before: str) -> str:
    """Where rows come from: device, versions, date, commit, and what was not measured."""
    commit = provenance.commit()
    name = commit["commit"] + ("-dirty" if commit["dirty"] else "")
    text = (
        f"{machine['device_name']}, Triton {digest.triton_version()}, torch {machine['torch']}, "
        f"{machine['date'][:10]}, commit {name}"
    )
    if rest:
        text += f"; {', '.join(map(str, rest))}: {before.partition(';')[0]}"
    return text


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Tuner:
    """One run on one device."""

    here: torch.device
    say: Callable[[str], None]
    end: float  # by time.monotonic, when nothing further is begun
    timer: Callable[[Callable], float] = field(init=False)

    def __post_init__(self):
        from . import triton_plans  # imports Triton

        self.plans, self.timer = triton_plans, timing.make_timer(self.here.type)
        self._checks: dict[str, triton_plans.Checks] = {}

    def dtype(self, width: str) -> torch.dtype:
        serving = [d for d in WIDTHS[width] if device.refuses(self.here, d) is None]
        if not serving:
            why = device.refuses(self.here, WIDTHS[width][0])
            raise CannotRun(f"no dtype of {width} bits is served: {why}")
        return serving[0]

    def tune(self, row: Row, present: Config, told: Callable[[], None]) -> tuple[Config, float]:
        """(the best plan found, its time over the present one's); `told` after each axis."""
        best, ratio = present, 1.0
        tiny = self.here.type == "cpu"
        held = self.plans.shapes(row.kernel, row.low, row.up_to, present, tiny)
        for axis in self.plans.axes(row.kernel, row.width, self.here):
            others = self.plans.plans(row.kernel, axis, best, present, self.here)
            if time.monotonic() < self.end and held and others:
                best, over = self._race(row, best, others, held)
                ratio *= over
            told()
        return best, ratio

    def _race(
        self, row: Row, best: Config, others: list[Config], held: list
    ) -> tuple[Config, float]:
        """The fastest of an axis, and its time over that of `best`, which it is where none is."""
        over: dict[Config, list[float]] = {config: [] for config in (best, *others)}
        for shape in held:
            for what, call in self._calls(row, shape):
                self._drop_wrong(row, best, over, what, shape.r)
                if time.monotonic() > self.end:  # times at some shapes alone prove nothing
                    return best, 1.0
                warm = {
                    repr(config): functools.partial(run_with, row.kernel, config, call)
                    for config in over
                }
                for one in warm.values():
                    for _ in range(timing.WARM_UP_CALLS[self.here.type]):
                        one()
                timed = timing.interleave(warm, self.timer, ROUNDS, SECONDS * len(warm))
                unit = timed[repr(best)].median_ms
                for config, ratios in over.items():
                    ratios.append(timed[repr(config)].median_ms / unit)
                means = {c: report.geometric_mean(ratios) for c, ratios in over.items()}
                over = {c: over[c] for c, mean in means.items() if mean < HOPELESS}
        means = {config: report.geometric_mean(ratios) for config, ratios in over.items()}
        fastest = min(means, key=means.__getitem__)
        return (fastest, means[fastest]) if means[fastest] < TIE else (best, 1.0)

    def _calls(self, row: Row, shape) -> Iterator[tuple[str, Callable]]:
        problem = self.plans.make(shape, self.dtype(row.width), self.here)
        # Its size is that of h and dh; what is in them costs no time.
        h = torch.zeros_like(problem.x[:, :1]).expand(-1, shape.r).contiguous()
        yield from self.plans.calls(row.kernel, problem, h, h).items()

    def _drop_wrong(self, row: Row, best: Config, over: dict, what: str, r: int) -> None:
        """Takes out what cannot be timed; raises CannotRun if that is the plan to beat."""
        if row.width not in self._checks:
            self._checks[row.width] = self.plans.Checks(self.dtype(row.width), self.here)
        for config in list(over):
            if time.monotonic() > self.end:
                return
            why = self._checks[row.width].objection(row.kernel, what, config, r)
            if why is not None and config == best:
                raise CannotRun(f"{row}: the plan to beat is wrong, {brief(config)}: {why}")
            if why is not None:
                self.say(f"{row}: skipped {brief(config)}: {why}")
                del over[config]


def run_with(kernel: str, config: Config, call: Callable) -> object:
    with configs.using(kernel, config):
        return call()


def brief(config: Config) -> str:
    """A plan in a line."""
    tile = "x".join(str(n) for n in (config.rows, config.cols, config.depth) if n)
    text = f"{tile} rank {config.rank} warps {config.warps} stages {config.stages}"
    return f"{text} programs {config.programs} {config.kind} group {config.group}"


def changes(before: Config, after: Config) -> str:
    """The fields in which a plan is another, "" if it is not."""
    old, new = asdict(before), asdict(after)
    return ", ".join(f"{name} {old[name]} to {new[name]}" for name in old if old[name] != new[name])


# ---- the command ---------------------------------------------------------------------------------


def device_here(dry_run: bool) -> torch.device:
    """What is measured on; raises CannotRun where there is nothing, or no sense in it."""
    if why := device.missing():
        raise CannotRun(why)
    here = torch.device("cpu")
    if not device.interpreted():
        here = torch.device("cuda", torch.cuda.current_device())
    elif not dry_run:
        raise CannotRun("times of Triton's interpreter say nothing: it needs a GPU, or --dry-run")
    if why := device.refuses(here, torch.float32):
        raise CannotRun(why)
    return here


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune_triton",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernels", type=shapes.listed(shapes.one_of("kernel", configs.KERNELS)),
        default=list(configs.KERNELS), metavar="NAME[,NAME]",
        help=f"only these, of {', '.join(configs.KERNELS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=math.inf,
        help="after which no further plan is begun and rows stay as they are; default: no limit",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=configs.TABLE, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="measure, but write nothing")
    return parser.parse_args()


COLUMNS = {"over": ("over present", report.times), "changes": ("changes", str)}


def tune(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures, prints what came of it, and returns the new table."""
    here, table = device_here(args.dry_run), configs.load()
    family, machine = device.family(here), report.environment(here.type)
    tuner = Tuner(
        here, lambda line: console.print(line, markup=False, soft_wrap=True),
        time.monotonic() + args.seconds,
    )  # fmt: skip
    rows = rows_of(table, family, args.kernels)
    chosen: dict[Row, Config] = {}
    shown = []
    with report.progress(console) as bar:
        lengths = {row: len(tuner.plans.axes(row.kernel, row.width, here)) for row in rows}
        task = bar.add_task(family, total=sum(lengths.values()))
        for row in rows:
            if time.monotonic() > tuner.end:
                break
            bar.update(task, description=str(row))
            present = plan_of(table[row.kernel][family][row.width][row.number])
            best, over = tuner.tune(row, present, lambda: bar.advance(task))
            if time.monotonic() > tuner.end and best == present:
                continue  # it was not compared with all
            chosen[row] = best
            shown.append({"name": str(row), "over": over, "changes": changes(present, best)})
    console.print(report.table(f"Plans of family {family}", shown, COLUMNS))
    rest = [row for row in rows_of(table, family, list(configs.KERNELS)) if row not in chosen]
    if rest:
        console.print(f"not measured: {', '.join(map(str, rest))}", markup=False)
    return tuned(table, family, chosen, origin(machine, rest, table["origin"][family]))


@torch.no_grad()
def main() -> int:
    args, console = parse(), Console()
    try:
        table = tune(args, console)
    except CannotRun as why:
        console.print(f"tune_triton cannot run: {why}", markup=False, soft_wrap=True)
        return 1
    if args.dry_run:
        console.print("wrote nothing (--dry-run)")
        return 0
    args.out.write_text(dump(table))
    console.print(f"wrote {args.out}: evidence measured with the table before it lapses")
    return 0


if __name__ == "__main__":
    sys.exit(main())

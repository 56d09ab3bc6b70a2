"""Tables, JSON, the plot, and what is recorded about the machine."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import lora_kernels as lk

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "out"
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
BUSY = 0.05  # share of the processors kept busy by others, above which a run is unreliable

# Extensions that decide which GEMM a CPU library takes.
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm")
_GPU_FIELDS = (
    "name", "driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.mem",
    "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
)  # fmt: skip

# ---- tables --------------------------------------------------------------------------------------


def digits(value: float) -> str:
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def flop_rate(tflops: float) -> str:
    return f"{tflops:.3g} T" if tflops >= 1 else f"{1e3 * tflops:.3g} G"


def times(value: float) -> str:
    return f"{value:.2f}x"


Columns = Mapping[str, tuple[str, Callable]]  # key of a row -> (header, formatter)


def table(title: str, rows: Iterable[Mapping], columns: Columns) -> Table:
    """One line per row: its name, then its value for each column, "-" where it has none.

    A row with `automatic` is marked; one with an `error` is named in the caption.
    """
    found = Table(
        title=title, title_justify="left", caption_justify="left", box=box.SIMPLE, pad_edge=False
    )
    found.add_column("", no_wrap=True)
    for header, _ in columns.values():
        found.add_column(header, justify="right", no_wrap=True)
    errors = []
    for row in rows:
        values = [row.get(key) for key in columns]
        cells = [
            "-" if v is None else f(v) for v, (_, f) in zip(values, columns.values(), strict=True)
        ]
        chosen = row.get("automatic")
        found.add_row(
            row["name"] + (" *" if chosen else ""), *cells, style="bold green" if chosen else ""
        )
        if row.get("error"):
            errors.append(f"{row['name']}: {row['error']}")
    found.caption = "\n".join(errors)
    return found


def failures(tables: Iterable[Mapping], describe: Callable[[Mapping], str]) -> list[str]:
    """A line for each row with an error, of tables that hold rows."""
    return [
        f"{row['name']}, {describe(table)}: {row['error']}"
        for table in tables
        for row in table["rows"]
        if "error" in row
    ]


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# ---- the machine ---------------------------------------------------------------------------------


def environment(device: str) -> dict:
    """Device, versions, commit and load: what a figure means nothing without."""
    changes = _git("status", "--porcelain")
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cpu_count": os.cpu_count(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "peft": version("peft"),
        "lora_kernels": lk.__version__,
        "backends": {name: missing or "usable" for name, missing in lk.backends().items()},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }
    if device == "cuda":
        found["gpu"] = gpu_state()
    return found


def gpu_state() -> dict[str, str]:
    """Driver, power, clocks and temperature at this moment, by nvidia-smi."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    index = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    values = _output("nvidia-smi", query, "--format=csv,noheader", index)
    if values is None:
        return {"error": "nvidia-smi did not answer"}
    return dict(zip(_GPU_FIELDS, values.split(", "), strict=True))


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
        return ran.stdout.strip()
    return None


def _git(*arguments: str) -> str | None:
    return _output("git", *arguments)


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu_info(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    flags = (_cpu_info("flags") or _cpu_info("Features")).split()
    return [flag for flag in flags if any(known in flag for known in _CPU_FLAGS)]


def _cpu_seconds() -> tuple[float, float] | None:
    """(wall clock, seconds that processors worked for others than this process), or None."""
    with contextlib.suppress(OSError):
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - sum(os.times()[:4])
    return None


_START = _cpu_seconds()


def _cpus_used_by_others() -> float | None:
    """The mean number of processors that were busy with something else since the start."""
    now = _cpu_seconds()
    if _START is None or now is None:
        return None
    return max(0.0, (now[1] - _START[1]) / (now[0] - _START[0]))


# ---- JSON ----------------------------------------------------------------------------------------


def output_path(text: str) -> Path:
    """An argparse type: a file to write. A committed result is never overwritten."""
    path = Path(text).resolve()
    if path.is_relative_to(RESULTS) and path.exists():
        raise argparse.ArgumentTypeError(
            f"got {text!r}, a committed result; expected a new file name, or one outside results/"
        )
    return path


def _dump(record: dict) -> str:
    """JSON with a line for each row of a table: short enough to read and to review."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value:
            parts = ",\n  ".join(json.dumps(part) for part in value)
            lines.append(f'"{key}": [\n  {parts}\n ]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}"


def finish(
    console: Console, path: Path, benchmark: str, machine: dict, settings: dict, content: dict
) -> int:
    """Writes one run: what it was, the `environment` it began in, its settings, and `content`.

    Prints the content's `failures`, if there are any, and returns the benchmark's exit code.
    """
    others = _cpus_used_by_others()
    machine = machine | {"cpus_used_by_others": others}
    if others is not None and others > BUSY * os.cpu_count():
        console.print(
            f"other processes kept {others:.2f} of {os.cpu_count()} processors busy meanwhile: "
            "these times are not reliable, run again on an idle machine",
            style="bold yellow",
        )
    if machine["device"] == "cuda":
        machine = machine | {"gpu_afterwards": gpu_state()}
    write(path, benchmark, machine, settings, content)
    console.print(f"wrote {path}")
    return conclude(console, content.get("failures", ()))


def conclude(console: Console, failures: Sequence[str]) -> int:
    """Prints what failed; the exit code."""
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red")
    return 1 if failures else 0


def write(path: Path, benchmark: str, machine: dict, settings: dict, content: dict) -> None:
    """One record, whole or as far as a run has come: whatever ends it, what it measured is kept.

    Its tables get the time, by the host's clock, at which they were there: `ended`.
    """
    for group in content.get("groups", ()):
        group.setdefault("ended", round(time.time(), 1))
    head = {"schema": SCHEMA, "benchmark": benchmark, "environment": machine, "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dump(head | content) + "\n")


# ---- the plot ------------------------------------------------------------------------------------

_COLORS = {  # in the order of the bars; what is not ours is grey
    "peft_fp32": "#d9d9d9",
    "peft": "#b8b8b8",
    "addmm": "#8c8c8c",
    "compiled": "#5f5f5f",
    "reference": "#c06060",
    "composed": "#e0a030",
    "triton": "#3f7fbf",
    "cpu": "#1b7f5c",
    "cuda": "#1b7f5c",
}


def plot(path: Path, groups: list[dict], machine: dict) -> None:
    """Time over the frozen linear's, by layer: a bar per contender, whiskers at the quartiles.

    One panel per (mode, dropout) and dtype. The scale is logarithmic and bars start at 1, so that
    twice as slow and twice as fast look alike.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((group["mode"], group["dropout"]) for group in groups))
    columns = {}  # dtype -> the labels of its layers
    for group in groups:
        columns.setdefault(group["dtype"], {})[_label(group)] = None
    widths = [max(2, len(labels)) for labels in columns.values()]
    present = {row["name"] for group in groups for row in group["rows"]}
    names = [name for name in _COLORS if name in present]
    figure, axes = plt.subplots(
        len(panels), len(columns), sharex="col", squeeze=False, layout="constrained",
        figsize=(max(7.0, 1.5 * sum(widths)), 2.0 * len(panels) + 1.4), width_ratios=widths,
    )  # fmt: skip
    for (mode, p), row in zip(panels, axes, strict=True):
        for (dtype, labels), axis in zip(columns.items(), row, strict=True):
            shown = [
                group
                for group in groups
                if (group["mode"], group["dropout"], group["dtype"]) == (mode, p, dtype)
            ]
            for place, name in enumerate(names):
                _bars(axis, shown, list(labels), name, place, len(names))
            _scale(axis, matplotlib.ticker)
            axis.set_title(f"{dtype}, {mode}, dropout {p:g}", loc="left", fontsize=9)
            axis.set_xticks(range(len(labels)), labels)
    title = f"LoRA linear layer on {machine['device_name']}, torch {machine['torch']}"
    if machine["device"] == "cpu":
        title += f", {machine['threads']} of {machine['cpu_count']} cores"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.supylabel("time / frozen linear (lower is better)", fontsize=8)
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=_COLORS[name]) for name in names], names,
        loc="outside lower center", ncols=len(names), frameon=False, fontsize=8,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(group: dict) -> str:
    lines = *group["label"].split(" "), f"M={group['m']} r={group['rank']}"
    return "\n".join(lines)


def _bars(axis, groups: list[dict], labels: list[str], name: str, place: int, count: int) -> None:
    """A contender's bars, from 1 to its ratio, the `place`-th of `count` at each label."""
    width = 0.8 / count
    xs, ratios, below, above = [], [], [], []
    for group in groups:
        rows = {row["name"]: row for row in group["rows"]}
        row, frozen = rows.get(name, {}), rows["frozen"]["median_ms"]
        if row.get("median_ms") is None:
            continue
        xs.append(labels.index(_label(group)) + (place - (count - 1) / 2) * width)
        ratios.append(row["median_ms"] / frozen)
        below.append((row["median_ms"] - row["q1_ms"]) / frozen)
        above.append((row["q3_ms"] - row["median_ms"]) / frozen)
    axis.bar(
        xs, [ratio - 1 for ratio in ratios], width * 0.92, bottom=1, yerr=[below, above],
        color=_COLORS[name], error_kw={"linewidth": 0.7},
    )  # fmt: skip


def _scale(axis, ticker) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1, 2, 5)
    if high / low < 20:
        steps = (1, 1.5, 2, 3, 5, 7) if high / low > 2.5 else (1, 1.1, 1.2, 1.4, 1.6, 2, 3, 5, 8, 9)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.axhline(1, color="black", linewidth=0.8)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, length=0)

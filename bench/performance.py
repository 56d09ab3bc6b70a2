"""`python -m bench.performance`: writes docs/performance.md from bench/results/.

Every number of that page comes from a committed JSON file, which its section names with the commit
that was measured. `--check` writes nothing and exits with 1 if the page would change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import bench_gemm, goals, report

PAGE = report.ROOT / "docs/performance.md"
HEAD = """# Performance

Every number that this project claims, by device. `make performance` writes this page from
[bench/results](../bench/results); what no file there proves is not on it. Times are medians of
samples that the contenders of a table took in turns; **bold** is what the call chooses by itself.
"""
NO_GPU = """
No GPU has measured anything yet: the table of the automatic choice is empty, and `composed` runs.

## Goals on an H100
"""

STATE = {"sm_mhz": "SM MHz", "celsius": "°C", "watts": "W"}  # of gpu_state.FIELDS
Table = dict[str, Any]  # a group of a result: what was timed, and its `rows`


class View(NamedTuple):
    """How one kind of result is shown: a line for each table, a column for each contender."""

    title: str
    about: str
    label: Callable[[Table], str]
    cell: Callable[[Table], str | None]  # of a row
    part: Callable[[Table], str] = lambda table: ""  # tables of one value share a heading
    pictures: tuple[str, ...] = ()  # beside that of the file's own name
    prepare: Callable[[list[Table]], list[Table]] = list  # what is shown, of the file's tables


def _shape(table: Table) -> str:
    return f"{table['label']}, {table['m']} x {table['n']} x {table['k']}, r={table['rank']}"


def _dropout(table: Table) -> str:
    return f"{table['dtype']}, dropout {table['dropout']:g}"


def _number(row: Table, key: str, form: str) -> str | None:
    return None if row.get(key) is None else form.format(row[key])


def _milliseconds(row: Table) -> str | None:
    if row.get("median_ms") is None:
        error = row.get("error", "")
        return "wrong" if "wrong" in error else "left out" if error else None
    return report.digits(row["median_ms"])


def _memory(row: Table) -> str:
    peak = f" / {row['peak_mib']:.3g}" if "peak_mib" in row else ""
    return f"{row['saved_per_row']:,.0f}{peak}"


def _over(row: Table) -> str | None:
    plain, vendor = (_number(row, key, "{:.3f}") for key in ("over_plain", "over_vendor"))
    return None if plain is None else f"{plain} / {vendor or '-'}"


def _model(row: Table) -> str | None:
    speed = _number(row, "tokens_per_s", "{:,.0f}")
    return speed and f"{speed} / {_number(row, 'of_peft', '{:.3f}')} / {row['peak_mib']:.4g}"


def _by_length(groups: list[Table]) -> list[Table]:
    """Of the sweep, a table a layer, rank and dropout: the faster form, by number of tokens."""
    found: dict[tuple, Table] = {}
    for table in groups:
        key = table["dropout"], table["rank"], table["label"]
        shown = found.setdefault(key, table | {"rows": []})
        if (row := bench_gemm.faster(table)) is not None:
            shown["rows"].append(row | {"name": f"{table['m']} tokens"})
    return list(found.values())


def _trained(row: Table) -> str | None:
    speed = _number(row, "tokens_per_s", "{:,.0f}")
    return speed and f"{speed} / {row['last_loss']:.4f} / {row['peak_mib']:.4g}"


VIEWS = {  # by the file's name, in the order of the page
    "model": View(
        "A decoder layer under PEFT",
        "Forward and backward without the optimizer: tokens a second / time over peft's / MiB that "
        "a step holds at most.",
        lambda t: f"{t['model']}, {t['tokens']} tokens, r={t['rank']}, adapters {t['adapters']}",
        _model, _dropout,
    ),
    "finetune": View(
        "A fine-tune under PEFT",
        "The same steps of one small model on one text: tokens a second / loss on held-out text "
        "afterwards / MiB that a step holds at most.",
        lambda t: (
            f"{t['model']}, {t['steps']} steps, r={t['rank']}, adapters {t['adapters']}, before "
            f"{t['first_loss']:.4f}"
        ),
        _trained, _dropout,
    ),
    "layers": View(
        "Layers", "Milliseconds of one linear layer.", _shape, _milliseconds,
        lambda t: f"{t['mode']}, {_dropout(t)}",
    ),
    "steps": View(
        "Steps of other models' layers", "Milliseconds of one linear layer.", _shape, _milliseconds,
        lambda t: f"{t['mode']}, {_dropout(t)}",
    ),
    "sweep": View(
        "The GEMM with the LoRA term, by layer, length and rank",
        "Time of the faster form over that of our GEMM without LoRA / over the vendor's.",
        lambda t: f"{t['label']}, {t['n']} x {t['k']}", _over,
        lambda t: f"{_dropout(t)}, r={t['rank']}", prepare=_by_length,
    ),
    "gemm": View(
        "The GEMM with the LoRA term",
        "Time over that of our GEMM without LoRA / over the vendor's.", _shape, _over, _dropout,
    ),
    "backward": View(
        "The backward pass", "Time over that of our GEMM of dx alone / over the vendor's.", _shape,
        _over, _dropout,
    ),
    "decode": View(
        "A few rows",
        "Time over that of our kernels without LoRA / over the vendor's frozen linear.",
        _shape, _over, _dropout,
    ),
    "group": View(
        "Projections of one input", "Time over that of the frozen linears.",
        lambda t: f"{t['label']}, r={t['rank']}",
        lambda row: _number(row, "over_frozen", "{:.3f}"),
        lambda t: f"{t['mode']}, {_dropout(t)}",
    ),
    "kernels": View(
        "Kernels", "Milliseconds of one kernel.",
        lambda t: f"{t['kernel']} {t['what']}, {_shape(t)}", _milliseconds, _dropout, ("roofline",),
    ),
    "overhead": View(
        "Host time of a call", "Microseconds on an 8 x 8 layer, where nothing but the host counts.",
        lambda t: f"{t['mode']}, dropout {t['dropout']:g}" + ", no dx" * (not t["x_requires_grad"]),
        lambda row: f"{row['median_us']:.1f}", lambda t: t["device"],
    ),
    "memory": View(
        "Memory", "Bytes a row that autograd keeps / MiB that a step holds at most.",
        lambda t: f"{t['label']}, {t['n']} x {t['k']}, r={t['rank']}", _memory, _dropout,
    ),
    "training": View(
        "Training",
        "Largest difference of a step's loss from eager's / lowest cosine to eager's adapters.",
        lambda t: t["dtype"],
        lambda row: f"{row['loss_difference']:.1e} / {row['cosine']:.5f}",
    ),
}  # fmt: skip


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *lines)]


def tables(view: View, groups: list[Table]) -> list[str]:
    """A markdown table for each part of a result."""
    found: list[str] = []
    for part in dict.fromkeys(map(view.part, groups)):
        shown = [table for table in groups if view.part(table) == part]
        names = list(dict.fromkeys(row["name"] for table in shown for row in table["rows"]))
        lines = []
        for table in shown:
            rows = {row["name"]: row for row in table["rows"]}
            chosen = table.get("automatic")
            cells = [view.cell(rows[name]) if name in rows else None for name in names]
            marked = [name == chosen or rows.get(name, {}).get("automatic") for name in names]
            lines.append([
                view.label(table),
                *(f"**{c}**" if c and m else c or "" for c, m in zip(cells, marked, strict=True)),
            ])  # fmt: skip
        found += ["", *([f"{part}:", ""] if part else []), *markdown(["", *names], lines)]
    return found


def source(path: Path, machine: Table, commit: str | None, dirty: bool | None) -> str:
    """Where a section's numbers come from."""
    changed = " with changes that are not in it" if dirty else ""
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "peft") if machine.get(name)
    )
    known = f"commit {commit[:10]}{changed}" if commit and commit != "unknown" else "a copy"
    date = f", {machine['date'][:10]}" if "date" in machine else ""
    link = f"[{path.name}](../bench/results/{path.parent.name}/{path.name})"
    return f"{link}: {known}, {versions}{date}."


def suite(path: Path) -> list[str]:
    """What a run of gpu_suite.sh said of each stage."""
    found = json.loads(path.read_text())
    excused = found.get("excused", {})
    lines = []
    for stage in found["stages"]:
        name, headline = stage["name"], stage.get("summary", {}).get("headline", "")
        said = f"excused: {excused[name]}; {stage['reason']}" if name in excused else headline
        lines.append([name, stage["status"], said, *map(_range(stage.get("gpu", {})), STATE)])
    said = source(path, found["device"], found["commit"], found["dirty"])
    header = ["stage", "status", "result", *STATE.values()]
    return ["", f"### {path.stem}", "", said, "", *markdown(header, lines)]


def _range(gpu: Table) -> Callable[[str], str]:
    """Of a value of the GPU's state, the lowest and the highest while a stage ran."""

    def found(key: str) -> str:
        ends = [gpu.get(end, {}).get(key) for end in ("lowest", "highest")]
        return "" if None in ends else " to ".join(f"{end:g}" for end in ends)

    return found


def section(path: Path, commit: str | None) -> list[str]:
    """One result; `commit` where a record beside it says more than the result's own."""
    view, result = VIEWS[path.stem], json.loads(path.read_text())
    machine = result["environment"]
    dirty = machine.get("git_dirty") if commit is None else False
    found = ["", f"### {view.title}", "", view.about, ""]
    found.append(source(path, machine, commit or machine.get("git_commit"), dirty))
    for name in (path.stem, *view.pictures):
        if path.with_name(f"{name}.png").exists():
            found += ["", f"![{name}](../bench/results/{path.parent.name}/{name}.png)"]
    return found + tables(view, view.prepare(result["groups"]))


def goals_of(folder: Path) -> list[str]:
    return ["", *markdown(goals.HEADER, [goal.line(folder) for goal in goals.GOALS])]


def entry(folder: Path) -> list[str]:
    """All that one device has measured."""
    files = [folder / f"{name}.json" for name in VIEWS if (folder / f"{name}.json").exists()]
    records = sorted(folder.glob("suite*.json"))
    if not files and not records:
        return []
    first = json.loads(files[0].read_text())["environment"] if files else {}
    about = first.get("device_name", folder.name)
    if first.get("device") == "cpu":
        about += f", {first['cpu_count']} cores, {first['torch_cpu_capability']}"
    found = ["", f"## {about}"]
    commits = {}
    if folder.name.startswith("cuda-"):
        found += ["", "### Goals", *goals_of(folder)]
    for path in records:
        found += suite(path)
        record = json.loads(path.read_text())
        commits |= {stage["name"]: record["commit"] for stage in record["stages"]}
    for path in files:
        found += section(path, commits.get(path.stem))
    return found


def page(results: Path) -> str:
    folders = sorted(folder for folder in results.iterdir() if folder.is_dir())
    gpus = any(folder.name.startswith("cuda-") for folder in folders)
    lines = [] if gpus else [NO_GPU.rstrip(), *goals_of(results / "no-gpu")]
    lines += [line for folder in sorted(folders, key=_gpus_first) for line in entry(folder)]
    return HEAD + "\n".join(lines) + "\n"


def _gpus_first(folder: Path) -> tuple[bool, str]:
    return not folder.name.startswith("cuda-"), folder.name


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.performance",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    found = page(args.results)
    if args.check:
        same = args.out.exists() and args.out.read_text() == found
        print(f"{args.out} is {'what the results say' if same else 'stale: make performance'}")
        return 0 if same else 1
    args.out.write_text(found)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

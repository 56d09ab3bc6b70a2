"""`python -m bench.plots FILE.json`: the pictures of published results.

Each is drawn beside its file, which keeps the name of the benchmark that wrote it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import operator
import sys
from pathlib import Path

from . import bench_gemm, report

COLORS = {"kernel": "#1b7f5c", "torch": "#b8b8b8"}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _tidy(axis, size: int) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=size, length=0)


def _log(scale) -> None:
    """Makes an axis's xaxis or yaxis logarithmic, its numbers written out: 1, 2, 5, 10."""
    scale.axes.set(**{f"{scale.axis_name}scale": "log"})
    scale.set_major_formatter("{x:g}")
    scale.set_minor_locator(_pyplot().matplotlib.ticker.LogLocator(subs=(2, 5)))
    scale.set_minor_formatter("{x:g}")


def _contenders(axis, tables: list[dict], names: list[str], value) -> None:
    """A bar of each name at each table: `value` of its row, none where there is no such row."""
    for i, name in enumerate(names):
        rows = [next((r for r in table["rows"] if r["name"] == name), {}) for table in tables]
        places = [place + (i + 0.5) / len(names) * 0.8 - 0.4 for place in range(len(tables))]
        axis.bar(places, [value(row) or 0 for row in rows], 0.72 / len(names), label=name)


def _save(figure, path: Path, title: str, machine: dict) -> None:
    about = f"{title} on {machine['device_name']}, torch {machine['torch']}"
    figure.suptitle(about, x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)


def plot_kernels(path: Path, groups: list[dict], machine: dict) -> None:
    """How many times faster than composed each kernel is, a panel per kernel, a bar per call.

    The black line over a call is its floor: of fused_gemm the frozen GEMM, of the others a copy of
    as many bytes, about the limit of what reads and writes its operands once.
    """
    plt = _pyplot()
    kernels = list(dict.fromkeys(group["kernel"] for group in groups))
    most = max(sum(group["kernel"] == kernel for group in groups) for kernel in kernels)
    figure, axes = plt.subplots(
        len(kernels), 1, squeeze=False, layout="constrained",
        figsize=(max(7.0, 1.0 * most), 2.6 * len(kernels) + 0.8),
    )  # fmt: skip
    for kernel, (axis,) in zip(kernels, axes, strict=True):
        shown = [group for group in groups if group["kernel"] == kernel]
        for place, group in enumerate(shown):
            _bars(axis, place, {row["name"]: row["median_ms"] for row in group["rows"]})
        labels = [
            "\n".join((g["what"], *g["label"].split(" "), f"p={g['dropout']:g}")) for g in shown
        ]
        axis.set_xticks(range(len(shown)), labels)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        _log(axis.yaxis)
        axis.set_title(kernel, loc="left", fontsize=9)
        _tidy(axis, 7)
    figure.supylabel("times faster than composed (higher is better)", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    handles.append(plt.Line2D([], [], color="black"))
    figure.legend(
        handles, ["lora_kernels", "torch, own dropout", "frozen GEMM, or copy of the bytes"],
        loc="outside lower center", ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    _save(figure, path, "Kernels", machine)


def _bars(axis, place: int, ms: dict[str, float]) -> None:
    """Of one call, given the time of each contender."""
    present = [name for name in COLORS if name in ms]
    width = 0.8 / len(present)
    for i, name in enumerate(present):
        centre = place + (i - (len(present) - 1) / 2) * width
        axis.bar(centre, ms["composed"] / ms[name], width * 0.92, color=COLORS[name])
    if (floor := ms.get("frozen", ms.get("copy"))) is not None:
        axis.hlines(ms["composed"] / floor, place - 0.42, place + 0.42, color="black")


def plot_gemm(path: Path, groups: list[dict], machine: dict) -> None:
    _plot_added(path, groups, machine, "LoRA on our GEMM")


def plot_backward(path: Path, groups: list[dict], machine: dict) -> None:
    _plot_added(path, groups, machine, "Gradients of x, A and B on our GEMM of dx")


def _plot_added(path: Path, groups: list[dict], machine: dict, title: str) -> None:
    """What LoRA adds to our GEMM, by rank: a panel per form and dropout, a line per layer.

    A dotted line is what the plan expects. A shape's entry in the legend has its GEMM's time over
    the vendor's, in the mean of its tables.
    """
    plt = _pyplot()
    styles = {"over_plain": "o-", "predicted_over_plain": ":"}
    # panel -> (layer, which of styles) -> by rank
    added: dict[tuple[str, float], dict[tuple[str, str], dict[int, float]]] = {}
    plain: dict[str, list[float]] = {}  # layer -> over the vendor
    for group in groups:
        layer = f"{group['m']} x {group['n']} x {group['k']} {group['dtype']}"
        for row in group["rows"]:
            if row["name"] == "plain" and row.get("over_vendor"):
                plain.setdefault(layer, []).append(row["over_vendor"])
            elif "plan" in row and row.get("over_plain"):
                panel = added.setdefault((row["name"], group["dropout"]), {})
                for key in styles:
                    if row.get(key):
                        line = panel.setdefault((layer, key), {})
                        line[group["rank"]] = 100 * (row[key] - 1)
    panels = sorted(added) or [("no form", 0.0)]
    ranks = sorted({group["rank"] for group in groups})
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, sharex=True, layout="constrained",
        figsize=(8.0, 2.2 * len(panels) + 1.4),
    )  # fmt: skip
    for panel, (axis,) in zip(panels, axes, strict=True):
        for (i, layer), (key, style) in itertools.product(enumerate(plain), styles.items()):
            percent = added.get(panel, {}).get((layer, key), {})
            places = [ranks.index(rank) for rank in percent]
            axis.plot(places, list(percent.values()), style, markersize=3, color=f"C{i}")
        axis.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{panel[0]}, dropout {panel[1]:g}", loc="left", fontsize=9)
        _tidy(axis, 8)
    axes[-1][0].set_xticks(range(len(ranks)), [f"r={rank}" for rank in ranks])
    figure.supylabel("time added to our GEMM without LoRA, % (lower is better)", fontsize=8)
    figure.legend(
        [plt.Line2D([], [], color=f"C{i}") for i in range(len(plain))],
        [f"M x N x K {layer}: GEMM {sum(v) / len(v):.3f}x vendor" for layer, v in plain.items()],
        loc="outside lower center", ncols=2, frameon=False, fontsize=7,
    )  # fmt: skip
    _save(figure, path, f"{title} (dotted: by the model)", machine)


def plot_group(path: Path, groups: list[dict], machine: dict) -> None:
    """Time over the frozen linears alone: a panel a mode, bars for each table of bench_group."""
    plt = _pyplot()
    modes = list(dict.fromkeys(table["mode"] for table in groups))
    names = list(dict.fromkeys(row["name"] for table in groups for row in table["rows"]))
    names.remove("frozen")
    figure, axes = plt.subplots(
        len(modes), 1, squeeze=False, layout="constrained", figsize=(8.0, 2.6 * len(modes) + 1.0)
    )
    for mode, (axis,) in zip(modes, axes, strict=True):
        tables = [table for table in groups if table["mode"] == mode]
        _contenders(axis, tables, names, lambda row: row.get("over_frozen"))
        labels = [f"{t['label']}\nr={t['rank']} p={t['dropout']:g}" for t in tables]
        axis.set_xticks(range(len(tables)), labels)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(mode, loc="left", fontsize=9)
        _tidy(axis, 7)
    figure.supylabel("time over the frozen linears (lower is better)", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path, "Projections of one x", machine)


def plot_model(path: Path, groups: list[dict], machine: dict) -> None:
    """Tokens a second, in times of PEFT's: a bar for each contender, by what was timed."""
    plt = _pyplot()
    names = list(dict.fromkeys(row["name"] for table in groups for row in table["rows"]))
    figure, axis = plt.subplots(layout="constrained", figsize=(8.0, 3.6))
    _contenders(axis, groups, names, lambda row: row.get("of_peft") and 1 / row["of_peft"])
    labels = [
        f"{t['tokens']} tokens, r={t['rank']}\n{t['dtype']}, adapters {t['adapters']}\n"
        f"dropout {t['dropout']:g}"
        for t in groups
    ]
    axis.set_xticks(range(len(groups)), labels)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    _tidy(axis, 7)
    figure.supylabel("tokens a second over peft's", fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    _save(figure, path, f"A decoder layer of {groups[0]['model']} under PEFT", machine)


def plot_sweep(path: Path, groups: list[dict], machine: dict) -> None:
    """What the faster form of LoRA adds to our GEMM: a row a dropout, a column a rank.

    Each line is a layer, over the number of tokens.
    """
    plt = _pyplot()
    ranks, dropouts = (sorted({table[key] for table in groups}) for key in ("rank", "dropout"))
    labels = list(dict.fromkeys(table["label"] for table in groups))
    tokens = sorted({table["m"] for table in groups})
    figure, axes = plt.subplots(
        len(dropouts), len(ranks), squeeze=False, sharex=True, sharey=True, layout="constrained",
        figsize=(2.6 * len(ranks) + 1.0, 2.6 * len(dropouts) + 1.6),
    )  # fmt: skip
    for (row, p), (column, rank) in itertools.product(enumerate(dropouts), enumerate(ranks)):
        axis = axes[row][column]
        for i, label in enumerate(labels):
            ours = [t for t in groups if (t["label"], t["rank"], t["dropout"]) == (label, rank, p)]
            added = {t["m"]: row["over_plain"] for t in ours if (row := bench_gemm.faster(t))}
            shown = [(tokens.index(m), 100 * (v - 1)) for m, v in sorted(added.items())]
            places, percent = zip(*shown, strict=True) if shown else ((), ())
            axis.plot(places, percent, marker=".", linewidth=0.9, **_line(i))
        axis.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"r={rank}, dropout {p:g}", loc="left", fontsize=9)
        axis.set_xticks(range(len(tokens)), [str(m) for m in tokens])
        _tidy(axis, 7)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("time added to our GEMM without LoRA, % (lower is better)", fontsize=8)
    figure.legend(
        [plt.Line2D([], [], **_line(i)) for i in range(len(labels))],
        labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7,
    )  # fmt: skip
    _save(figure, path, "LoRA on our GEMM by layer", machine)


def _line(place: int) -> dict:
    """The look of one of many lines."""
    return {"color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--"}


def plot_memory(path: Path, groups: list[dict], machine: dict) -> None:
    """Bytes a row that autograd keeps, left, and the peak of a step, right, where it was measured.

    A line of panels a dtype and dropout, bars for each layer on a logarithmic scale: none is no
    bar. PEFT's formula, which PEFT's own layer computes, is left out.
    """
    plt = _pyplot()
    lines = list(dict.fromkeys((table["dtype"], table["dropout"]) for table in groups))
    names = list(dict.fromkeys(row["name"] for table in groups for row in table["rows"]))
    if any(name.startswith("lora.Linear") for name in names):
        names = [name for name in names if name not in ("eager", "addmm")]
    what = {"saved_per_row": "bytes a row kept for backward", "peak_mib": "peak of a step, MiB"}
    most = max(sum((t["dtype"], t["dropout"]) == line for t in groups) for line in lines)
    figure, axes = plt.subplots(
        len(lines), len(what), squeeze=False, layout="constrained",
        figsize=(2 * max(4.0, 0.42 * most) + 0.6, 2.3 * len(lines) + 0.6),
    )  # fmt: skip
    for (row, line), (column, key) in itertools.product(enumerate(lines), enumerate(what)):
        axis = axes[row][column]
        tables = [t for t in groups if (t["dtype"], t["dropout"]) == line]
        if not any(r.get(key) for table in tables for r in table["rows"]):
            axis.set_visible(False)
            continue
        _contenders(axis, tables, names, operator.methodcaller("get", key))
        _log(axis.yaxis)
        axis.set_ylim(bottom=1)
        labels = [table["label"] for table in tables]
        axis.set_xticks(range(len(tables)), labels, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_title(f"{what[key]}, {line[0]}, dropout {line[1]:g}", loc="left", fontsize=8)
        _tidy(axis, 6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8
    )
    _save(figure, path, "Memory of one layer (lower is better)", machine)


def plot_roofline(path: Path, groups: list[dict], machine: dict) -> None:
    """FLOP/s over FLOP a byte, a panel a dtype: filled is ours, hollow `composed`.

    The roofs are measured beside them: the copy of the most bytes, which no cache holds, and the
    fastest frozen GEMM of the vendor's.
    """
    plt = _pyplot()
    dtypes = list(dict.fromkeys(table["dtype"] for table in groups))
    kernels = [k for k in dict.fromkeys(table["kernel"] for table in groups) if k != "dropout_mask"]
    figure, axes = plt.subplots(
        1, len(dtypes), squeeze=False, layout="constrained", figsize=(5.2 * len(dtypes) + 0.6, 4.6)
    )
    for dtype, axis in zip(dtypes, axes[0], strict=True):
        low, high = math.inf, 0.0  # FLOP a byte
        for table in [table for table in groups if table["dtype"] == dtype]:
            color = f"C{kernels.index(table['kernel'])}" if table["kernel"] in kernels else ""
            for row in table["rows"]:
                if row["name"] in ("kernel", "composed") and row.get("tflops"):
                    filled = color if row["name"] == "kernel" else "none"
                    intensity = row["tflops"] / row["gb_per_s"] * 1e3
                    low, high = min(low, intensity), max(high, intensity)
                    axis.plot(
                        intensity, row["tflops"] * 1e3, "o", markersize=5, color=color,
                        markerfacecolor=filled,
                    )  # fmt: skip
        if high and (roofs := _roofs(groups, dtype)) is not None:
            memory, compute = roofs
            ridge = compute / memory
            ends = low / 1.5, ridge, max(high, ridge) * 1.5
            axis.plot(ends, (ends[0] * memory, compute, compute), color="black", linewidth=0.9)
            rate = report.flop_rate(compute / 1e3)
            axis.set_title(
                f"{dtype}: copy {memory:,.0f} GB/s, frozen GEMM {rate}FLOP/s", loc="left",
                fontsize=9,
            )  # fmt: skip
        _log(axis.xaxis)
        _log(axis.yaxis)
        axis.set_xlabel("FLOP a byte of operands, each once", fontsize=8)
        _tidy(axis, 7)
    axes[0][0].set_ylabel("GFLOP/s", fontsize=8)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=f"C{i}")
               for i in range(len(kernels))]  # fmt: skip
    handles.append(plt.Line2D([], [], marker="o", linestyle="", color="grey", fillstyle="none"))
    figure.legend(
        handles, [*kernels, "composed"], loc="outside lower center", ncols=len(handles),
        frameon=False, fontsize=8,
    )  # fmt: skip
    _save(figure, path, "Kernels under measured roofs", machine)


def _roofs(groups: list[dict], dtype: str) -> tuple[float, float] | None:
    """(GB/s, GFLOP/s), or None where no copy or no frozen GEMM was timed."""
    rows = [(table["dtype"], row) for table in groups for row in table["rows"]]
    copies = [row for _, row in rows if row["name"] == "copy"]
    frozen = [r["tflops"] * 1e3 for of, r in rows if of == dtype and r["name"] == "frozen"]
    if not copies or not frozen:
        return None
    longest = max(copies, key=lambda row: row["gb_per_s"] * row["median_ms"])
    return longest["gb_per_s"], max(frozen)


BY_STAGE = {  # what is drawn of what a stage leaves, by the picture's name
    "layers": {"layers": report.plot}, "steps": {"steps": report.plot},
    "kernels": {"kernels": plot_kernels, "roofline": plot_roofline},
    "gemm": {"gemm": plot_gemm}, "sweep": {"sweep": plot_sweep},
    "backward": {"backward": plot_backward}, "group": {"group": plot_group},
    "model": {"model": plot_model}, "memory": {"memory": plot_memory},
}  # fmt: skip


def draw(path: Path) -> list[Path]:
    """Draws all there is of a result, beside it; the pictures."""
    result = json.loads(path.read_text())
    drawn = []
    for name, plot in BY_STAGE.get(path.stem, {}).items():
        drawn.append(path.with_name(f"{name}.png"))
        plot(drawn[-1], result["groups"], result["environment"])
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plots",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json")
    for path in parser.parse_args().results:
        if path.stem not in BY_STAGE:
            parser.error(f"argument FILE.json: got {path.name}; expected one of "
                         f"{', '.join(f'{name}.json' for name in BY_STAGE)}")  # fmt: skip
        for drawn in draw(path):
            print(f"wrote {drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

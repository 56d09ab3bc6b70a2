"""The plots of published results, one for each stage that leaves a JSON file."""

from __future__ import annotations

import itertools
from pathlib import Path

from . import report

COLORS = {"kernel": "#1b7f5c", "torch": "#b8b8b8"}


def plot_kernels(path: Path, groups: list[dict], machine: dict) -> None:
    """How many times faster than composed each kernel is, a panel per kernel, a bar per call.

    The black line over a call is a copy of as many bytes: about the limit of what reads and writes
    its operands once, though reads alone may be faster.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        axis.set_title(kernel, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7, length=0)
    figure.suptitle(
        f"Kernels on {machine['device_name']}, torch {machine['torch']}", x=0.01, ha="left",
        fontsize=9,
    )  # fmt: skip
    figure.supylabel("times faster than composed (higher is better)", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    handles.append(plt.Line2D([], [], color="black"))
    figure.legend(
        handles, ["lora_kernels", "torch, own dropout", "copy of the operands' bytes"],
        loc="outside lower center", ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis, place: int, ms: dict[str, float]) -> None:
    """Of one call, given the time of each contender."""
    present = [name for name in COLORS if name in ms]
    width = 0.8 / len(present)
    for i, name in enumerate(present):
        centre = place + (i - (len(present) - 1) / 2) * width
        axis.bar(centre, ms["composed"] / ms[name], width * 0.92, color=COLORS[name])
    if "copy" in ms:
        axis.hlines(ms["composed"] / ms["copy"], place - 0.42, place + 0.42, color="black")


def plot_gemm(path: Path, groups: list[dict], machine: dict) -> None:
    _plot_added(path, groups, machine, "LoRA on our GEMM")


def plot_backward(path: Path, groups: list[dict], machine: dict) -> None:
    _plot_added(path, groups, machine, "Gradients of x, A and B on our GEMM of dx")


def _plot_added(path: Path, groups: list[dict], machine: dict, title: str) -> None:
    """What LoRA adds to our GEMM, by rank: a panel per form and dropout, a line per layer.

    A dotted line is what the plan expects. A shape's entry in the legend has its GEMM's time over
    the vendor's, in the mean of its tables.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, length=0)
    axes[-1][0].set_xticks(range(len(ranks)), [f"r={rank}" for rank in ranks])
    figure.suptitle(
        f"{title} on {machine['device_name']}, torch {machine['torch']}; dotted: by the model",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    figure.supylabel("time added to our GEMM without LoRA, % (lower is better)", fontsize=8)
    figure.legend(
        [plt.Line2D([], [], color=f"C{i}") for i in range(len(plain))],
        [f"M x N x K {layer}: GEMM {sum(v) / len(v):.3f}x vendor" for layer, v in plain.items()],
        loc="outside lower center", ncols=2, frameon=False, fontsize=7,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_group(path: Path, groups: list[dict], machine: dict) -> None:
    """Time over the frozen linears alone: a panel a mode, bars for each table of bench_group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(table["mode"] for table in groups))
    names = list(dict.fromkeys(row["name"] for table in groups for row in table["rows"]))
    names.remove("frozen")
    figure, axes = plt.subplots(
        len(modes), 1, squeeze=False, layout="constrained", figsize=(8.0, 2.6 * len(modes) + 1.0)
    )
    for mode, (axis,) in zip(modes, axes, strict=True):
        tables = [table for table in groups if table["mode"] == mode]
        for i, name in enumerate(names):
            over = [
                next((row.get("over_frozen") for row in table["rows"] if row["name"] == name), None)
                for table in tables
            ]
            places = [place + (i + 0.5) / len(names) * 0.8 - 0.4 for place in range(len(tables))]
            axis.bar(places, [value or 0 for value in over], 0.72 / len(names), label=name)
        labels = [f"{t['label']}\nr={t['rank']} p={t['dropout']:g}" for t in tables]
        axis.set_xticks(range(len(tables)), labels)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(mode, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7, length=0)
    figure.suptitle(
        f"Projections of one x on {machine['device_name']}, torch {machine['torch']}", x=0.01,
        ha="left", fontsize=9,
    )  # fmt: skip
    figure.supylabel("time over the frozen linears (lower is better)", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_model(path: Path, groups: list[dict], machine: dict) -> None:
    """Tokens a second, in times of PEFT's: a bar for each contender, by what was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["name"] for table in groups for row in table["rows"]))
    figure, axis = plt.subplots(layout="constrained", figsize=(8.0, 3.6))
    for i, name in enumerate(names):
        rows = [next((r for r in t["rows"] if r["name"] == name), {}) for t in groups]
        faster = [1 / row["of_peft"] if row.get("of_peft") else 0 for row in rows]
        places = [place + (i + 0.5) / len(names) * 0.8 - 0.4 for place in range(len(groups))]
        axis.bar(places, faster, 0.72 / len(names), label=name)
    labels = [
        f"{t['tokens']} tokens, r={t['rank']}\n{t['dtype']}, adapters {t['adapters']}\n"
        f"dropout {t['dropout']:g}"
        for t in groups
    ]
    axis.set_xticks(range(len(groups)), labels)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7, length=0)
    figure.suptitle(
        f"A decoder layer of {groups[0]['model']} under PEFT on {machine['device_name']}, torch "
        f"{machine['torch']}", x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    figure.supylabel("tokens a second over peft's", fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


BY_STAGE = {  # by the stage that leaves what is plotted
    "layers": report.plot, "kernels": plot_kernels, "gemm": plot_gemm, "backward": plot_backward,
    "group": plot_group, "model": plot_model,
}  # fmt: skip

"""`python -m bench.publish OUT`: makes the suite's OUT a result under bench/results/<device>/.

An OUT of `gpu_suite.sh --triton` becomes suite-triton.json and selfcheck-triton.json there, beside
what that device has of the CUDA kernels, and needs neither their tests nor the sanitizers.

Refuses an OUT whose stages failed, were killed, or did not prove the kernels right, and one from a
tree that differed from its commit, or whose kernel sources are not those of this tree: a committed
number must belong to committed code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kernels.triton_kernels import digest

from . import gpu_suite, report, shapes
from .stages import FAILED, NOT_RUN, PASSED, TIMED_OUT

PLOTTED = ("layers", "kernels", "gemm", "backward", "group")  # stages that leave a JSON file each
# by backend, the stage whose file bench.dispatch reads
SELFCHECKS = {"cuda": "selfcheck", "triton": "selfcheck-triton"}
ENTRY = (
    "suite.json",
    *(f"{name}.json" for name in SELFCHECKS.values()),
    *(f"{name}.{kind}" for name in PLOTTED for kind in ("json", "png")),
)
# of a suite with --triton; its record lies beside that of the other
ENTRY_TRITON = ("suite-triton.json", f"{SELFCHECKS['triton']}.json")
NEEDED = {"cuda": ("tests", *gpu_suite.SANITIZERS), "triton": ("triton",)}  # stages, by profile
COLORS = {"kernel": "#1b7f5c", "torch": "#b8b8b8"}


def slug(device_name: str) -> str:
    """`cuda-nvidia-h100-80gb-hbm3`."""
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


class Here(NamedTuple):
    """What this tree has: a measurement of anything else is no evidence for it."""

    sources: str  # sources_hash
    binary: str | None  # binary_hash, None if it is older than the sources
    triton: Callable[[str], str]  # the hash of the Triton kernels with a version of Triton

    @classmethod
    def now(cls) -> Here:
        current = gpu_suite.is_current()
        binary = gpu_suite.binary_hash() if current else None
        return cls(gpu_suite.sources_hash(), binary, digest.of_version)


def profile_of(suite: dict) -> str:
    """Which kernels a suite ran: cuda or triton."""
    return suite.get("profile", "cuda")


def suite_of(folder: Path, backend: str) -> Path:
    """The record in an entry that speaks for a backend."""
    own = folder / ENTRY_TRITON[0]
    return own if backend == "triton" and own.exists() else folder / "suite.json"


def objections(suite: dict, allow_not_run: Sequence[str] = ()) -> list[str]:
    """Why this record proves nothing, apart from the code's origin (see `doubts`)."""
    if suite["schema"] != gpu_suite.SCHEMA:
        return [f"schema {suite['schema']}, expected {gpu_suite.SCHEMA}"]
    status = {stage["name"]: stage["status"] for stage in suite["stages"]}
    found = [] if suite["finished"] else ["the suite was cut off"]
    found += [f"stage {n} {s}" for n, s in status.items() if s in (FAILED, TIMED_OUT)]
    found += [
        f"stage {name} was not run"
        for name in NEEDED[profile_of(suite)]
        if status.get(name, NOT_RUN) == NOT_RUN and name not in allow_not_run
    ]
    return found


def doubts(suite: dict, here: Here) -> list[str]:
    """Why what was measured may not be the code of this tree."""
    found = []
    if suite["dirty"] is None:
        found.append("nobody knows whether its tree was that of its commit")
    elif suite["dirty"]:
        found.append(f"its tree was not that of commit {suite['commit']}")
    if profile_of(suite) == "triton":
        if suite["triton_sha256"] != here.triton(suite["device"].get("triton", "")):
            found.append("its Triton kernels are not those of this tree")
        return found
    if suite["sources_sha256"] != here.sources:
        found.append("its csrc is not that of this tree")
    built = any(s["name"] == "build" and s["status"] == PASSED for s in suite["stages"])
    if not built and suite["binary_sha256"] != here.binary:
        found.append("it took a binary as it was, and that is not the one built from this tree")
    return found


def publish(
    out: Path, results: Path, *, allow_dirty: bool = False, allow_not_run: Sequence[str] = (),
    replace: bool = False,
) -> Path:  # fmt: skip
    """Writes the entry and returns its folder; raises SystemExit where that is refused."""
    path = out / "suite.json"
    if not path.is_file():
        raise SystemExit(f"bench.publish: {out} has no suite.json: expected an OUT of gpu_suite.sh")
    suite = json.loads(path.read_text())
    found = objections(suite, allow_not_run)
    if not found and not allow_dirty:
        found = [f"{doubt} (--allow-dirty)" for doubt in doubts(suite, Here.now())]
    if found:
        raise SystemExit("bench.publish: refused:\n  " + "\n  ".join(found))
    folder = results / slug(suite["device"]["device_name"])
    kept: set[str] = set()  # files of a suite of the other profile
    entry, record = ENTRY, "suite.json"
    if profile_of(suite) == "triton":
        entry, record = ENTRY_TRITON, ENTRY_TRITON[0]
        kept = {*ENTRY, *(p.name for p in folder.glob("*"))} - {*entry}
    elif (folder / ENTRY_TRITON[0]).exists():
        kept = {*ENTRY_TRITON}
    if any(path.name not in kept for path in folder.glob("*")) and not replace:
        raise SystemExit(f"bench.publish: {folder} exists; pass --replace to overwrite it")
    for stale in {*entry} - kept:
        (folder / stale).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / record).write_text(report._dump(suite) + "\n")
    passed = {stage["name"] for stage in suite["stages"] if stage["status"] == PASSED}
    plots = (report.plot, plot_kernels, plot_gemm, plot_backward, plot_group)
    for name, plot in zip(PLOTTED, plots, strict=True):
        if name in passed:
            shutil.copyfile(out / f"{name}.json", folder / f"{name}.json")
            result = json.loads((out / f"{name}.json").read_text())
            plot(folder / f"{name}.png", result["groups"], result["environment"])
    for name in SELFCHECKS.values():
        if name in passed and f"{name}.json" not in kept:
            shutil.copyfile(out / f"{name}.json", folder / f"{name}.json")
    return folder


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.publish",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="what gpu_suite.sh wrote")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="default: %(default)s")
    parser.add_argument("--replace", action="store_true", help="overwrite this device's results")
    parser.add_argument(
        "--allow-dirty", action="store_true",
        help="take it although the measured code is not that of a commit, or not this tree's",
    )  # fmt: skip
    parser.add_argument(
        "--allow-not-run", metavar="NAME[,NAME]", default=[],
        type=shapes.listed(shapes.one_of("stage", gpu_suite.SANITIZERS)),
        help=f"stages that may be missing, of {', '.join(gpu_suite.SANITIZERS)}",
    )  # fmt: skip
    args = parser.parse_args()
    folder = publish(
        args.out, args.results, allow_dirty=args.allow_dirty, allow_not_run=args.allow_not_run,
        replace=args.replace,
    )  # fmt: skip
    print(f"wrote {folder}; make dispatch takes what it proves into the automatic choice")
    return 0


if __name__ == "__main__":
    sys.exit(main())

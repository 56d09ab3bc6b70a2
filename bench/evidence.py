"""What the suite's stages prove: reads what each left behind, for `stages.Stage.judge`.

Each judge returns the summary of a stage that passed, and raises Failed where the stage did not, or
NotRun where nothing was exercised: no test collected, no kernel built.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from . import counters as ncu_counters
from . import traffic
from .stages import Failed, Finished, NotRun, exit_code

_CHECKED = re.compile(r"^(?:checked|ran) (\d+) calls of (.+): (\d+) wrong$", re.MULTILINE)
_NO_TIME = re.compile(r"^no time for (\d+) calls$", re.MULTILINE)
_NEVER = re.compile(r"^no call of (.+) was made$", re.MULTILINE)
_FILE = re.compile(r"^(\w+\.py): (.+)$", re.MULTILINE)
_REFUSED = re.compile(r"^refused (\d+) calls$", re.MULTILINE)
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) errors?")
_HAZARDS = re.compile(r"RACECHECK SUMMARY: (\d+) hazards?")


def tests(finished: Finished, reports: Path) -> dict:
    """Of bench.gpu_tests and its JUnit files: passed, failed, skipped, and how each file ended."""
    cases = [
        case
        for report in sorted(reports.glob("*.xml"))
        for case in ElementTree.parse(report).getroot().findall(".//testcase")
    ]
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {
        "passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped,
    }  # fmt: skip
    ends = dict(_FILE.findall(finished.text()))
    killed = [f"{name} {end}" for name, end in ends.items() if end.startswith("killed")]
    if bad or killed:
        first = f", the first {bad[0].get('name')}" if bad else ""
        raise Failed("; ".join([f"{len(bad)} of {len(cases)} tests{first}", *killed]))
    exit_code(finished)
    if counts["passed"] == 0:
        raise NotRun(f"no test ran, {skipped} were skipped" if skipped else "no test is marked gpu")
    note = f", {skipped} skipped" if skipped else ""
    ran = sum(end == "exit code 0" for end in ends.values())
    return counts | {"headline": f"{counts['passed']} tests of {ran} files{note}"}


def sanitizer(finished: Finished, tool: str) -> dict:
    """Of compute-sanitizer around bench.sanitize: `calls`, `ops`, and the tool's count of errors.

    All three are needed: the tool's summary is clean where the process died without an error of the
    kind that the tool looks for, and the exit code is clean where the tool never attached.
    """
    text = finished.text()
    if "Device not supported" in text:
        raise NotRun("compute-sanitizer does not support this device")
    pattern = _HAZARDS if tool == "racecheck" else _ERRORS
    summaries = [int(count) for count in pattern.findall(text)]
    if any(summaries):
        raise Failed(f"{sum(summaries)} errors: {_first_error(text)}")
    checked = _CHECKED.search(text)
    if checked is None:
        raise Failed(f"the checked process did not finish: {finished.last_line()}")
    calls, ops, wrong = int(checked[1]), checked[2].split(", "), int(checked[3])
    if wrong:
        raise Failed(f"{wrong} of {calls} calls gave wrong results")
    if not summaries:
        raise Failed(f"{tool} printed no summary: {finished.last_line()}")
    exit_code(finished)
    if calls == 0:
        raise NotRun("no call was checked")
    refused = int(found[1]) if (found := _REFUSED.search(text)) else 0
    headline = f"0 errors in {calls} calls of {', '.join(ops)}"
    if refused:
        headline += f", {refused} refused"
    if (found := _NEVER.search(text)) is not None:
        raise Failed(f"there was no time for any call of {found[1]}")
    unchecked = int(found[1]) if (found := _NO_TIME.search(text)) else 0
    if unchecked:
        headline += f", no time for {unchecked}"
    if tool == "racecheck":
        headline += " (it sees shared memory only)"
    return {
        "calls": calls, "ops": ops, "errors": 0, "refused": refused, "unchecked": unchecked,
        "headline": headline,
    }  # fmt: skip


def _first_error(text: str) -> str:
    for line in text.splitlines():
        found = line.removeprefix("========= ").strip()
        if line.startswith("========= ") and not found.startswith("COMPUTE-SANITIZER"):
            return found
    return "see the log"


def kernels(finished: Finished, path: Path) -> dict:
    """Of bench_kernels: one row per kernel, layer and dropout, and geometric means by kernel."""
    exit_code(finished)
    rows = []
    for group in json.loads(path.read_text())["groups"]:
        (ours,) = (row for row in group["rows"] if row["name"] == "kernel")
        rows.append(
            {key: group[key] for key in ("kernel", "what", "label", "dropout")}
            | {key: ours.get(key) for key in
               ("median_ms", "gb_per_s", "tflops", "speedup_over_composed", "of_copy")}
        )  # fmt: skip
    if not rows:
        raise NotRun("no CUDA kernels are built")
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for key in ("speedup_over_composed", "of_copy"):
            if row[key] is not None:
                ratios[row["kernel"]][key].append(row[key])
    means = {
        kernel: {key: _geometric_mean(values) for key, values in found.items()}
        for kernel, found in ratios.items()
    }
    names = {"speedup_over_composed": "composed", "of_copy": "copy"}
    parts = [
        f"{kernel} " + " ".join(f"{mean:.2f}x {names[key]}" for key, mean in found.items())
        for kernel, found in means.items()
    ]
    return {"rows": rows, "geometric_means": means, "headline": ", ".join(parts)}


def gemm(finished: Finished, path: Path) -> dict:
    """Of bench_gemm or bench_backward: means of our GEMM over the vendor's, of forms over ours."""
    exit_code(finished)
    result = json.loads(path.read_text())
    ratios: dict[str, list[float]] = defaultdict(list)
    for group in result["groups"]:
        for row in group["rows"]:
            if "plan" not in row:
                continue  # not ours
            over = "vendor" if row["name"].split(" ")[0] == "plain" else "plain"
            if row[f"over_{over}"] is not None:
                ratios[f"{row['name']} {{:.3f}}x {over}"].append(row[f"over_{over}"])
    if not ratios:
        raise NotRun("no form of our GEMM serves a call")
    left_out = sum(len(group["left_out"]) for group in result["groups"])
    parts = [text.format(_geometric_mean(values)) for text, values in ratios.items()]
    headline = ", ".join(parts) + (f", {left_out} calls not served" if left_out else "")
    return {"means": result["summary"], "left_out": left_out, "headline": headline}


def group(finished: Finished, path: Path) -> dict:
    """Of bench_group: means of a group over frozen and over separate calls, by backend and mode."""
    rows = [
        (f"{row['name']} {table['mode']}", row)
        for table, row in _rows(finished, path)
        if row.get("of_apart") is not None
    ]
    return _means(rows, {"over_frozen": "frozen", "of_apart": "apart"}, "no backend runs a group")


def model(finished: Finished, path: Path) -> dict:
    """Of bench_model: means of a step's time over peft's and over frozen, by contender."""
    rows = [
        (row["name"], row)
        for _, row in _rows(finished, path)
        if row["name"] not in ("frozen", "peft")
    ]
    return _means(rows, {"of_peft": "peft", "over_frozen": "frozen"}, "no layer was timed")


def finetune(finished: Finished, path: Path) -> dict:
    """Of bench_finetune: means of a step's time over peft's, and the losses of the first table."""
    rows = [(row["name"], row) for _, row in _rows(finished, path) if row["name"] != "peft"]
    found = _means(rows, {"of_peft": "peft"}, "nothing was trained")
    tables = json.loads(path.read_text())["groups"]
    losses = ", ".join(f"{row['name']} {row['last_loss']:.3f}" for row in tables[0]["rows"])
    about = f"; held-out loss {tables[0]['first_loss']:.3f} -> {losses}"
    return found | {"headline": found["headline"] + about}


def memory(finished: Finished, path: Path) -> dict:
    """Of bench_memory: means of the peak over that of PEFT's formula, by contender."""
    rows = []
    for table, row in _rows(finished, path):
        (eager,) = (other for other in table["rows"] if other["name"] == "eager")
        if row["name"] not in ("frozen", "eager") and eager.get("peak_bytes"):
            rows.append((row["name"], {"peak": row["peak_bytes"] / eager["peak_bytes"]}))
    return _means(rows, {"peak": "peak of eager"}, "no peak was measured")


def _rows(finished: Finished, path: Path) -> list[tuple[dict, dict]]:
    """(table, row) of all that a benchmark measured."""
    exit_code(finished)
    return [
        (table, row) for table in json.loads(path.read_text())["groups"] for row in table["rows"]
    ]


def _means(rows: list[tuple[str, dict]], keys: dict[str, str], nothing: str) -> dict:
    """The summary of rows by name: geometric means of what `keys` names and calls so."""
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, row in rows:
        for key in keys:
            ratios[name][key].append(row[key])
    if not ratios:
        raise NotRun(nothing)
    means = {
        name: {key: _geometric_mean(values) for key, values in found.items()}
        for name, found in ratios.items()
    }
    parts = [
        " ".join([name, *(f"{mean[key]:.3f}x {what}" for key, what in keys.items())])
        for name, mean in means.items()
    ]
    return {"geometric_means": means, "headline": ", ".join(parts)}


def layers(finished: Finished, path: Path) -> dict:
    """Of `python -m bench`: its own summary."""
    exit_code(finished)
    result = json.loads(path.read_text())
    if not result["groups"]:
        raise NotRun("no layer was timed")
    chosen = sorted({group["automatic"] for group in result["groups"]})
    overall = [row for row in result["summary"] if row["name"] == "all"]
    parts = [
        f"{value:.2f}x {key.removeprefix('over_')}"
        for row in overall
        for key, value in row.items()
        if key.startswith("over_")
    ]
    headline = f"{', '.join(chosen)}, fwd+bwd: {' '.join(parts)}"
    return {"automatic": chosen, "means": result["summary"], "headline": headline}


def selfcheck(finished: Finished, path: Path) -> dict:
    """Of `python -m lora_kernels selfcheck`: how many points, and classes of shapes won."""
    from lora_kernels import records, shape_classes  # a broken torch must not end the suite

    if finished.code == 2:
        raise NotRun(finished.last_line())
    exit_code(finished)
    record = records.parse(json.loads(path.read_text()))
    if wrong := record.wrong():
        raise Failed(f"wrong: {', '.join(wrong)}")
    if not record.points:
        raise NotRun("no point was timed")
    classes = shape_classes.classes(record.points)
    won = sum(found.won for found in classes)
    headline = f"{won} of {len(classes)} shape classes won, {len(record.points)} points timed"
    return {"points": len(record.points), "classes": len(classes), "won": won,
            "headline": headline}  # fmt: skip


def dram(finished: Finished, csv: Path) -> dict:
    """Of ncu around bench.traffic: the rows of `traffic.rows`."""
    rows = _profiled(finished, csv, traffic.rows)
    by_kernel = defaultdict(list)
    for row in rows:
        if row["name"] == "kernel":
            by_kernel[row["kernel"]].append(row["over_operands"])
    parts = [f"{name} {_geometric_mean(v):.2f}x operands" for name, v in by_kernel.items()]
    for row in rows:
        if row["kernel"] == traffic.STEP:
            gigabytes = (row["read_bytes"] + row["written_bytes"]) * 1e-9
            over = f" {row['over_published']:.2f}x published" if "over_published" in row else ""
            parts.append(f"step {row['k']} {row['name']} {gigabytes:.3f} GB{over}")
    return {"rows": rows, "headline": ", ".join(parts)}


def counters(finished: Finished, csv: Path) -> dict:
    """Of ncu around bench.counters: the rows of `counters.rows`."""
    rows = _profiled(finished, csv, ncu_counters.rows)
    parts = []
    for row in rows:
        longest = max(row["launches"], key=lambda launch: launch["us"] or 0.0)
        shares = (("tensor", "tensor_percent"), ("L2 hits", "l2_hit_percent"))
        said = [f"{what} {longest[key]:.0f} %" for what, key in shares if longest[key] is not None]
        waits = next(iter(longest["stalls"]), None)
        said += [f"waits for {waits}"] if waits else []
        parts.append(f"{row['m']}x{row['n']}x{row['k']} {row['name']}: {' '.join(said)}")
    return {"rows": rows, "headline": ", ".join(parts)}


def _profiled(finished: Finished, csv: Path, rows: Callable[[str, str], list[dict]]) -> list[dict]:
    """What `rows` finds in a process's output and in ncu's CSV."""
    text = csv.read_text(errors="replace") if csv.exists() else ""
    if (why := traffic.refusal(finished.text() + text)) is not None:
        raise NotRun(why)
    exit_code(finished)
    found = rows(finished.text(), text)
    if not found:
        raise NotRun("no call was profiled")
    return found


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))

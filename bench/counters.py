"""`ncu ... python -m bench.counters`: what an SM does in a GEMM, the vendor's and ours.

Each GEMM runs once under ncu's own sections of compute, memory and warps, of which `rows` picks the
share of time in which the tensor pipe works, L2 hits, and what warps wait for. The calls are told
apart as in `bench.traffic`. Run it by `ncu_command`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import traffic
from .stages import skip

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
# M, N, K: tiles that fill 132 multiprocessors a whole number of times, and some that do not
SHAPES = ((8448, 4096, 4096), (8192, 4096, 4096), (8192, 14336, 4096))
RANK, DROPOUT = 16, 0.1
STALLS = 3  # of the reasons for waiting, how many are named
ISSUING = ("selected", "not_selected")  # what no warp waits for
TIME, L2_HITS = "gpu__time_duration.sum", "lts__t_sector_hit_rate.pct"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
_STALL = re.compile(
    r"smsp__average_warps?_(?:issue|latency_issue)_stalled_(\w+?)(?:_per\w+)?\.ratio"
)


def ncu_command(log: Path) -> list[str]:
    """Profiles `main`; the CSV, a line for each launch, goes to `log`."""
    sections = [part for name in SECTIONS for part in ("--section", name)]
    return [
        traffic.cuda_tool("ncu"), "--clock-control", "none", "--profile-from-start", "off",
        *sections, "--metrics", f"{TIME},{L2_HITS},{TENSOR}", "--page", "raw",
        "--print-units", "base", "--csv", "--log-file", str(log),
        sys.executable, "-m", "bench.counters",
    ]  # fmt: skip


def launches(text: str) -> list[dict]:
    """Kernel launches of ncu's raw page, in order: `kernel`, and the value of each metric."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found = []
    for row in csv.DictReader(lines):
        if row["ID"].isdecimal():  # the line under the header has the units
            values = {key: traffic.number(value or "") for key, value in row.items() if "__" in key}
            found.append({"kernel": row["Kernel Name"], **values})
    return found


def summary(launch: dict) -> dict:
    """Of a launch: microseconds, percent of the tensor pipe and of L2 hits, longest waits."""
    waits = {
        name[1]: value
        for key, value in launch.items()
        if (name := _STALL.fullmatch(key)) and name[1] not in ISSUING and value is not None
    }
    longest = sorted(waits, key=waits.__getitem__, reverse=True)[:STALLS]
    nanoseconds = launch.get(TIME)
    return {
        "kernel": launch["kernel"][:120],
        "us": None if nanoseconds is None else nanoseconds * 1e-3,
        "tensor_percent": launch.get(TENSOR), "l2_hit_percent": launch.get(L2_HITS),
        "stalls": {name: waits[name] for name in longest},
    }  # fmt: skip


def rows(output: str, text: str) -> list[dict]:
    """The calls that `main` listed in `output`, each with its launches."""
    return [
        call | {"launches": [summary(launch) for launch in group]}
        for call, group in traffic.grouped(output, launches(text))
    ]


def calls(device: str = "cuda") -> Iterator[tuple[dict, Callable]]:
    """The vendor's GEMM and ours in every form that serves: what it is, and the call."""
    from . import bench_gemm, contenders, shapes

    for m, n, k in SHAPES:
        case = shapes.Case(shapes.Shape(f"{n}x{k}", m, n, k), "bf16", RANK)
        layer = bench_gemm.Layer(contenders.make_problem(case, device), DROPOUT)
        about = {**case.shape._asdict(), "rank": RANK, "dtype": case.dtype, "dropout": DROPOUT}
        yield about | {"name": "vendor"}, layer.vendor
        for ours in layer.ours(0, 0):
            try:
                plan = ours.plan()
            except RuntimeError:
                continue  # this form does not serve the call
            yield about | {"name": ours.name, "plan": plan}, ours.call


def main() -> int:
    import torch

    from . import bench_gemm

    if not torch.cuda.is_available():
        return skip("torch sees no CUDA device")
    if not bench_gemm.built("cuda"):
        return skip("no CUDA kernels are built, or none for this device")
    done = []
    with torch.no_grad():
        for about, call in calls():
            traffic.profile(call)
            done.append(about)
    print(traffic.MARK + json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())

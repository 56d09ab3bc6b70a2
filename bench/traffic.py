"""`ncu ... python -m bench.traffic`: each CUDA kernel and its PyTorch counterpart once, cold.

Then whole steps, forward and backward of a layer, by backend cuda and by eager PyTorch. The calls
are separated by torch's spin kernel, so that `grouped` can tell which launches are whose: an op may
launch several kernels. Run it by `ncu_command`. ncu empties the caches before each launch, so the
bytes are those of operands that lie in memory.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .stages import Failed, NotRun, skip

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
PRESETS = ("llama-3.1-8b:q/o", "llama-3.1-8b:down")
ROWS = 8192
DROPOUTS = (0.0, 0.1)
RANK = 16
# K = N of a layer -> bytes of its step at 8192 rows, r = 16, dropout 0.1, bf16, on an H100, as
# LoRAFusion (arXiv 2510.00206) publishes them for its fused kernels; read as 1e9 bytes to the GB.
PUBLISHED = {4096: 1.258e9, 5120: 1.836e9, 8192: 4.044e9}
STEP = "step"
SEPARATOR = "spin_kernel"
MARK = "CALLS "  # begins the line that lists the calls in order


def ncu_command(log: Path) -> list[str]:
    """Profiles `main`; the CSV goes to `log`."""
    return [
        cuda_tool("ncu"), "--clock-control", "none", "--profile-from-start", "off",
        "--metrics", f"{READ},{WRITTEN}", "--print-units", "base",
        "--csv", "--log-file", str(log), sys.executable, "-m", "bench.traffic",
    ]  # fmt: skip


def cuda_tool(name: str) -> str:
    """The path of a program of the CUDA toolkit; raises NotRun if it is not installed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which(name) or shutil.which(f"{home}/bin/{name}")
    if found is None:
        raise NotRun(f"no {name} on PATH or in {home}/bin")
    return found


def launches(text: str) -> list[dict]:
    """Kernel launches of ncu's CSV, in order: kernel, read and written bytes, None if unknown."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict] = {}
    names = {READ: "read", WRITTEN: "written"}
    for row in csv.DictReader(lines):
        launch = {"kernel": row["Kernel Name"], "read": None, "written": None}
        launch = found.setdefault(row["ID"], launch)
        if row["Metric Name"] in names:
            launch[names[row["Metric Name"]]] = number(row["Metric Value"])
    return list(found.values())


def number(text: str) -> float | None:
    """A value of ncu's CSV, None for "n/a"."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def grouped(output: str, launched: list[dict]) -> list[tuple[dict, list[dict]]]:
    """The calls that the profiled process listed in `output`, each with its launches."""
    listed = [line for line in output.splitlines() if line.startswith(MARK)]
    if not listed:
        raise Failed("the profiled process did not finish")
    groups: list[list[dict]] = []
    for launch in launched:
        if SEPARATOR in launch["kernel"]:
            groups.append([])
        elif groups:
            groups[-1].append(launch)
    calls = json.loads(listed[0].removeprefix(MARK))
    if len(groups) != len(calls) or not all(groups):
        raise Failed(f"ncu saw {len(groups)} groups of launches, {len(calls)} calls were made")
    return list(zip(calls, groups, strict=True))


def rows(output: str, text: str) -> list[dict]:
    """The calls that `main` listed in `output`, with the DRAM bytes that ncu's CSV has for each."""
    found = []
    for call, group in grouped(output, launches(text)):
        values = [launch[key] for launch in group for key in ("read", "written")]
        if None in values:
            raise Failed(f"ncu has no DRAM bytes for {group[0]['kernel']}")
        found.append(
            call | {
                "read_bytes": sum(launch["read"] for launch in group),
                "written_bytes": sum(launch["written"] for launch in group),
                "over_operands": sum(values) / call["operand_bytes"],
                "launches": [launch["kernel"][:120] for launch in group],
            }
        )  # fmt: skip
        if "published_bytes" in call:
            found[-1]["over_published"] = sum(values) / call["published_bytes"]
    return found


def refusal(output: str) -> str | None:
    """Why ncu could not count on this machine, if that is what it says."""
    for sign in ("ERR_NVGPUCTRPERM", "driver resource was unavailable", "LibraryNotLoaded"):
        if sign in output:
            return f"ncu may not or cannot read the counters here ({sign})"
    return None


def steps(
    widths: Sequence[int] = tuple(PUBLISHED), rows: int = ROWS, backend: str = "cuda",
    device: str = "cuda",
) -> Iterator[tuple[dict, Callable]]:  # fmt: skip
    """A step of each square layer by `backend` and by eager PyTorch: what it is, and the call."""
    from . import contenders, shapes

    dropout = DROPOUTS[-1]
    for width in widths:
        case = shapes.Case(shapes.Shape(f"{width}x{width}", rows, width, width), "bf16", RANK)
        problem = contenders.make_problem(case, device)
        found = contenders.make_contenders(problem, dropout, [backend], {"compiled"})
        x, weight, a, b, dy = (t.numel() * t.element_size() for t in problem)
        about = {
            "kernel": STEP, "what": "fwd+bwd", **case.shape._asdict(), "rank": RANK,
            "dtype": case.dtype, "dropout": dropout,
            # x, A and B have gradients of their size, and dy an output.
            "operand_bytes": 2 * (x + a + b + dy) + weight,
        }  # fmt: skip
        if width in PUBLISHED:
            about["published_bytes"] = PUBLISHED[width]
        for name, contender in ((backend, found[backend]), ("eager", found["peft"])):
            yield about | {"name": name}, contender.call("fwd+bwd", problem.dy)


def main() -> int:
    import torch

    from lora_kernels import schemas

    from . import bench_kernels, contenders, shapes

    if not torch.cuda.is_available():
        return skip("torch sees no CUDA device")
    kernels = [name for name in bench_kernels.KERNELS if schemas.runs_here(name, "CUDA")]
    if not kernels:
        return skip("no CUDA kernels are built")
    done = []
    with torch.no_grad():
        for name in PRESETS:
            ((label, nk),) = shapes.preset(name).items()
            case = shapes.Case(shapes.Shape(label, ROWS, *nk), "bf16", RANK)
            problem = contenders.make_problem(case, "cuda")
            for p in DROPOUTS:
                for job in bench_kernels.jobs(case, problem, p):
                    if job.kernel not in kernels:
                        continue
                    # The mask in plain PyTorch is a hundred launches, and nothing to compare with.
                    mask = job.kernel == "dropout_mask"
                    for who in ("kernel",) if mask else ("kernel", "composed"):
                        profile(job.calls[who])
                        done.append({
                            "kernel": job.kernel, "what": job.what, "name": who,
                            **case.shape._asdict(), "rank": RANK, "dtype": case.dtype,
                            "dropout": p, "operand_bytes": job.bytes,
                        })  # fmt: skip
    for about, call in steps():
        profile(call)
        done.append(about)
    print(MARK + json.dumps(done))
    return 0


def profile(call: Callable) -> None:
    """One call for ncu to see, behind the separator."""
    import torch

    call()  # what happens once, such as a library's start, is not the call's traffic
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

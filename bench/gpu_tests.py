"""`python -m bench.gpu_tests REPORTS`: the tests marked gpu, a process a file, simple ones first.

A kernel that hangs or faults takes the rest of its file along and no other file, and so does one
that cannot be imported. JOBS files run at a time; pytest's report of each goes to REPORTS, its
output follows on ours. What still runs where the stage's time ends is killed.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import stages
from .provenance import ROOT

TESTS = ROOT / "tests"
JOBS = 4
MARGIN = 4.0  # seconds before the stage's end in which what still runs is killed and told
NO_TESTS = 5  # pytest's exit code when it collected none
# The file that compiles for minutes; then what the later ones stand on: the mask, single kernels,
# what the emulator assumes, whole passes.
FIRST = (
    "triton_device", "dropout", "down_proj", "fused_gemm_sm80", "decode", "emulator_probes",
    "backward_sm80", "forward", "backward", "group_kernels", "cuda_backend", "criterion_cuda",
)  # fmt: skip


def files() -> list[Path]:
    """Those with a test marked gpu, in the order of FIRST, then by name."""
    marked = [path for path in TESTS.glob("test_*.py") if "mark.gpu" in path.read_text()]

    def place(path: Path) -> tuple[int, str]:
        name = path.stem.removeprefix("test_")
        return FIRST.index(name) if name in FIRST else len(FIRST), name

    return sorted(marked, key=place)


def run(path: Path, which: str, reports: Path, seconds: float) -> str:
    """Runs one file: what became of it."""
    log = reports / f"{path.stem}.log"
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-k", which, "-v", "--tb=short",
        "--durations=5", "-p", "no:cacheprovider", f"--junitxml={reports / path.stem}.xml",
        str(path),
    ]  # fmt: skip
    limit = min(seconds, stages.seconds_left() - MARGIN)
    if limit <= 0:
        return "killed before it began"
    code = stages.execute(command, limit, log, {}, ROOT, own_group=False)
    return f"killed after {limit:.0f} s" if code is None else f"exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_tests",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reports", type=Path, metavar="REPORTS", help="a folder")
    parser.add_argument("-k", dest="which", default="", help="as pytest's")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a file, at most")
    parser.add_argument("--jobs", type=int, default=JOBS, help="default: %(default)s")
    args = parser.parse_args()
    args.reports.mkdir(parents=True, exist_ok=True)
    found = files()
    with ThreadPoolExecutor(args.jobs) as pool:
        ends = pool.map(lambda path: run(path, args.which, args.reports, args.seconds), found)
        said = dict(zip(found, ends, strict=True))
    for path in found:
        log = args.reports / f"{path.stem}.log"
        print(f"{log.read_text(errors='replace') if log.exists() else ''}")
    for path, end in said.items():
        print(f"{path.name}: {end}")
    fine = {f"exit code {code}" for code in (0, NO_TESTS)}
    return 0 if fine.issuperset(said.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

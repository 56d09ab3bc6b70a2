"""`python -m bench.publish OUT`: makes the suite's OUT a result under bench/results/<device>/.

An OUT of another profile becomes suite-PROFILE.json and the files of its stages there, beside what
that device has of the others. None of them runs the tests or sanitizers of the CUDA kernels.

Refuses an OUT whose stages failed, were killed, or did not prove the kernels right, and one from a
tree that differed from its commit, or whose kernel sources are not those of this tree: a committed
number must belong to committed code. What other profiles measured of the CUDA kernels needs an
entry beside it that proves these kernels right.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_kernels.triton_kernels import digest

from . import gpu_suite, plots, profiles, provenance, report
from .stages import FAILED, NOT_RUN, PASSED, TIMED_OUT

# by backend, the stage whose file bench.dispatch reads
SELFCHECKS = {"cuda": "selfcheck", "triton": "selfcheck-triton"}
RESULTS = {  # the stages of each profile whose files are kept
    "cuda": ("selfcheck", "layers", "kernels", "gemm", "backward", "group", "decode"),
    "sweep": ("sweep", "steps", "memory"),
    "model": ("model", "finetune"),
    "triton": ("selfcheck-triton",),
}
RECORDS = {p: "suite.json" if p == "cuda" else f"suite-{p}.json" for p in profiles.PROFILES}
NEEDED = {  # stages, by profile
    "cuda": ("tests", *profiles.SANITIZERS), "sweep": ("sweep",), "model": ("model",),
    "triton": ("triton",),
}  # fmt: skip


EXCUSABLE = (  # not what proves the kernels right, but for tools that may blame right ones
    *profiles.SANITIZERS,
    *(name for profile, limits in profiles.PROFILES.items() for name in limits
      if name not in ("probe", "build", *NEEDED[profile])),
)  # fmt: skip
OF_CUDA = ("sweep", "model")  # profiles that time the CUDA kernels and do not test them


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
        current = provenance.is_current()
        binary = provenance.binary_hash() if current else None
        return cls(provenance.sources_hash(), binary, digest.of_version)


def profile_of(suite: dict) -> str:
    """Which of profiles.PROFILES a suite ran."""
    return suite.get("profile", "cuda")


def suite_of(folder: Path, backend: str) -> Path:
    """The record in an entry that speaks for a backend."""
    return folder / RECORDS[backend]


def entry(profile: str) -> tuple[str, ...]:
    """The files that a profile leaves in its device's folder, the record first."""
    drawn = [f"{name}.png" for stage in RESULTS[profile] for name in plots.BY_STAGE.get(stage, {})]
    return RECORDS[profile], *(f"{stage}.json" for stage in RESULTS[profile]), *drawn


def objections(suite: dict) -> list[str]:
    """Why this record proves nothing, apart from the code's origin (see `doubts`).

    What it says under "excused", by stage and with a reason, is no objection.
    """
    if suite["schema"] != gpu_suite.SCHEMA:
        return [f"schema {suite['schema']}, expected {gpu_suite.SCHEMA}"]
    excused = set(suite.get("excused", ())).intersection(EXCUSABLE)
    status = {s["name"]: s["status"] for s in suite["stages"] if s["name"] not in excused}
    found = [] if suite["finished"] else ["the suite was cut off"]
    found += [f"stage {n} {s}" for n, s in status.items() if s in (FAILED, TIMED_OUT)]
    found += [
        f"stage {name} was not run"
        for name in NEEDED[profile_of(suite)]
        if status.get(name, NOT_RUN) == NOT_RUN and name not in excused
    ]
    return found


def unproven(suite: dict, folder: Path) -> str | None:
    """Why nothing in a device's entry proves the kernels that this suite timed; None if it does."""
    path = folder / RECORDS["cuda"]
    record = json.loads(path.read_text()) if path.exists() else None
    if record is None or objections(record):
        return f"{path} does not prove these kernels right: publish the profile `cuda` first"
    if record["sources_sha256"] != suite["sources_sha256"]:
        return f"{path} is of other kernel sources: publish the profile `cuda` of these first"
    return None


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


def result_of(out: Path, name: str) -> str:
    """What a stage left in OUT, or among its logs."""
    path = out / f"{name}.json"
    if path.exists():
        return path.read_text()
    with tarfile.open(out / "logs.tar.gz") as tar:
        return tar.extractfile(f"logs/{name}.json").read().decode()


def publish(
    out: Path, results: Path, *, allow_dirty: bool = False,
    excuses: Mapping[str, str] | None = None, replace: bool = False,
) -> Path:  # fmt: skip
    """Writes the entry and returns its folder; raises SystemExit where that is refused."""
    path = out / "suite.json"
    if not path.is_file():
        raise SystemExit(f"bench.publish: {out} has no suite.json: expected an OUT of gpu_suite.sh")
    suite = json.loads(path.read_text())
    if excuses:
        suite["excused"] = dict(excuses)
    found = objections(suite)
    if not found and not allow_dirty:
        found = [f"{doubt} (--allow-dirty)" for doubt in doubts(suite, Here.now())]
    if found:
        raise SystemExit("bench.publish: refused:\n  " + "\n  ".join(found))
    folder = results / slug(suite["device"]["device_name"])
    profile = profile_of(suite)
    if profile in OF_CUDA and (why := unproven(suite, folder)) is not None:
        raise SystemExit(f"bench.publish: refused:\n  {why}")
    record, *files = entry(profile)
    if any((folder / name).exists() for name in (record, *files)) and not replace:
        raise SystemExit(f"bench.publish: {folder} has them; pass --replace to overwrite them")
    for stale in files:
        (folder / stale).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / record).write_text(report._dump(suite) + "\n")
    passed = {stage["name"] for stage in suite["stages"] if stage["status"] == PASSED}
    for name in passed.intersection(RESULTS[profile]):
        path = folder / f"{name}.json"
        path.write_text(result_of(out, name))
        plots.draw(path)
    return folder


def _excuse(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if name not in EXCUSABLE or not reason.strip():
        names = ", ".join(EXCUSABLE)
        raise argparse.ArgumentTypeError(f"got {text!r}; expected STAGE=REASON, STAGE of {names}")
    return name, reason.strip()


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
        "--excuse", metavar="STAGE=REASON", default=[], action="append", type=_excuse,
        help="take it although this stage failed, or a sanitizer did not run; the reason, such as "
        "a known false report of the tool's version, is published",
    )  # fmt: skip
    args = parser.parse_args()
    folder = publish(
        args.out, args.results, allow_dirty=args.allow_dirty, excuses=dict(args.excuse),
        replace=args.replace,
    )  # fmt: skip
    print(
        f"wrote {folder}; make dispatch takes what it proves into the automatic choice, "
        "make performance into docs/performance.md"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

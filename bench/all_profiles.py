"""`python -m bench.all_profiles OUT`: everything that a GPU has to show, and what follows from it.

Runs every profile of gpu_suite.sh, each into a folder of OUT, the CUDA kernels first; publishes
what they prove under bench/results/; makes the automatic choice's table and docs/performance.md
from that. What a profile does not prove is refused, stays in OUT, and stops nothing. All are run
before any is published, since a run of a changed tree is no evidence: for the same reason OUT must
be new, and where git does not look. Commit what it wrote and run it again: `automatic` is then
what the first run proved. Other arguments are the suite's. Exits with 1 if anything was refused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import profiles, provenance


def refusal(out: Path) -> str | None:
    """Why runs that write to this folder would prove nothing; None if they may."""
    if out.exists():
        return f"{out} is there already; name a new folder"
    if provenance.commit()["dirty"] is not False:
        return (
            "this tree is not that of a commit: commit your changes, or where there is no .git set "
            "LORA_KERNELS_COMMIT"
        )
    out.mkdir(parents=True)
    probe = out / "probe"
    probe.touch()
    seen = provenance.commit()["dirty"]
    probe.unlink()
    if seen is not False:
        out.rmdir()
        return f"git sees {out}: name a folder outside of the repository, or under bench/out"
    return None


def run(module: str, *arguments: str) -> bool:
    """Whether the command succeeded."""
    print(f"\n==> {module} {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(command, cwd=provenance.ROOT).returncode == 0


def measure_and_publish(out: Path, more: Sequence[str]) -> list[str]:
    """The profiles that were refused."""
    for profile in profiles.PROFILES:
        run("gpu_suite", str(out / profile), f"--{profile}", *more)
    refused = [p for p in profiles.PROFILES if not run("publish", str(out / p), "--replace")]
    run("dispatch")
    run("performance")
    return refused


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.all_profiles",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    args, more = parser.parse_known_args()
    out = args.out.resolve()
    if (why := refusal(out)) is not None:
        parser.error(why)
    refused = measure_and_publish(out, more)
    for profile in refused:
        print(f"refused: {profile}: `python -m bench.publish {out / profile}` says why")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

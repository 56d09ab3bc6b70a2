"""PEFT's own tests, run twice: as they are, and with `lora_kernels.patch_peft`.

    python tests/peft_judge.py                        what `make test-peft` runs
    python tests/peft_judge.py test_mixed.py -k lora  other files and options of pytest

The tests come from the sdist of the PEFT that is installed, which is downloaded once. Passed are
both runs alike, test by test; and the fused op must have served at least `FLOOR` of the calls of
lora.Linear.forward, else it was PEFT that was tested twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/peft"
FILES = ["test_custom_models.py"]
OPTIONS = ["-k=-LoraConfig-"]  # of all tuners, those of LoRA
FLOOR = 0.25
TIMEOUT = 300  # seconds a test

# Written beside PEFT's tests. They reach for the hub unless a model is known already.
CONFTEST = """\
import json
import os

import pytest

from . import testing_utils


class Known(dict):
    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 0


testing_utils._HUB_MODEL_ACCESSES = Known()

if os.environ["JUDGED"] == "patched":
    import lora_kernels as lk
    from lora_kernels import peft_linear

    calls = {"fused": 0, "own": 0}
    fused, own = peft_linear.fused_lora_linear, peft_linear.peft_forward

    def count_fused(*args, **kwargs):
        calls["fused"] += 1
        return fused(*args, **kwargs)

    def count_own():
        calls["own"] += 1
        return own()

    lk.patch_peft()
    peft_linear.fused_lora_linear, peft_linear.peft_forward = count_fused, count_own

    def pytest_sessionfinish(session):
        with open(f"{os.environ['JUDGED_CALLS']}.{os.getpid()}", "w") as file:
            json.dump(calls, file)
"""


def fetch(version: str) -> Path:
    """The folder of PEFT's sdist, whose tests are a package with our conftest."""
    folder = FOLDER / f"peft-{version}"
    if not (folder / "tests").is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(FOLDER)]
        subprocess.run([*download, *options, f"peft=={version}"], check=True)
        with tarfile.open(FOLDER / f"peft-{version}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    (folder / "tests/__init__.py").touch()
    (folder / "tests/conftest.py").write_text(CONFTEST)
    return folder


def run(
    folder: Path, how: str, arguments: list[str], workers: int
) -> tuple[dict[str, str], Counter]:
    """(outcome by test, calls of lora.Linear.forward) of one run, "own" or "patched"."""
    report, counted = folder / f"{how}.xml", folder / f"{how}.calls"
    for old in folder.glob(f"{counted.name}.*"):
        old.unlink()
    environment = dict(
        os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", JUDGED=how, JUDGED_CALLS=str(counted)
    )
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-n", str(workers)]
    command += [f"--junitxml={report}", f"--timeout={TIMEOUT}", "-W", "ignore", "--tb=short"]
    done = subprocess.run([*command, *arguments], cwd=folder, env=environment)
    if done.returncode not in (0, 1):  # 1: some failed, which the other run may do too
        raise SystemExit(f"peft_judge: pytest of run '{how}' ended with {done.returncode}")
    calls: Counter = Counter()
    for file in folder.glob(f"{counted.name}.*"):
        calls.update(json.loads(file.read_text()))
    return outcomes(report), calls


def outcomes(report: Path) -> dict[str, str]:
    """passed, skipped, failed or error, by test."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = kinds[0] if kinds else "passed"
    return found


def differences(own: dict[str, str], patched: dict[str, str]) -> list[str]:
    """Tests whose outcome patching changes."""
    return [
        f"{name}: {own.get(name, 'absent')} -> {patched.get(name, 'absent')}"
        for name in sorted(own.keys() | patched.keys())
        if own.get(name) != patched.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--floor", type=float, default=FLOOR, help="least share of fused calls")
    args, rest = parser.parse_known_args()
    import peft

    folder = fetch(peft.__version__)
    files = [a for a in rest if a.endswith(".py")]
    options = [a for a in rest if not a.endswith(".py")] or ([] if files else OPTIONS)
    arguments = [f"tests/{Path(f).name}" for f in files or FILES] + options
    own, _ = run(folder, "own", arguments, args.workers)
    patched, calls = run(folder, "patched", arguments, args.workers)

    changed = differences(own, patched)
    share = calls["fused"] / max(calls.total(), 1)
    for name, found in (("own", own), ("patched", patched)):
        print(f"{name:8}", dict(Counter(found.values())))
    print(f"calls    {calls['fused']} fused, {calls['own']} PEFT's own: {share:.0%} fused")
    print(*(f"CHANGED  {line}" for line in changed), sep="\n")
    if "passed" not in own.values() or share < args.floor:
        print(f"peft_judge: {share:.0%} of the calls were fused, expected {args.floor:.0%} or more")
        return 1
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())

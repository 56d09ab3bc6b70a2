"""Each planted bug of mutants.py turns the suite red; unchanged sources leave it green."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import decode_problems
import group_problems
import mutants
import mutants_backward
import mutants_decode
import mutants_forward
import mutants_group
import mutants_launch
import mutants_sm80_gemm
import mutants_sm80_grad
import mutation_problems
import numpy as np
import pytest
import sm80_problems
from emulator import build
from mutants import Mutant, spots

FILES = (
    mutants, mutants_forward, mutants_backward, mutants_group, mutants_decode, mutants_sm80_gemm,
    mutants_sm80_grad, mutants_launch,
)  # fmt: skip
KILLED = [mutant for file in FILES for mutant in file.KILLED]
SURVIVORS = [known for file in FILES for known in file.SURVIVORS]
ALL = KILLED + [mutant for mutant, _ in SURVIVORS]
UNUSED_TILES = ("X(16, 64, 4, 2, 64, 6)", "X(128, 8)")
TIMEOUT = 60  # seconds; a part of the suite takes a few, all of it 20 on an idle machine


@pytest.fixture(scope="session")
def problems(tmp_path_factory) -> Path:
    found = mutation_problems.all_problems() | group_problems.all_problems()
    found |= decode_problems.all_problems()
    found |= sm80_problems.all_problems()
    arrays = {f"{name}/{key}": v for name, p in found.items() for key, v in p.items()}
    path = tmp_path_factory.mktemp("mutations") / "problems.npz"
    np.savez(path, **arrays)
    return path


def run_suite(
    library: Path, problems: Path, *kinds: str, timeout: int = TIMEOUT
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "emulator.suite", str(library), str(problems), *kinds]
    folder = build.EMULATOR.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=folder)


def forget_unused_tiles(plan: Path) -> None:
    text = plan.read_text()
    for tile in UNUSED_TILES:
        assert tile in text
        text = text.replace(tile, "")
    plan.write_text(text)


def plant(mutant: Mutant, tree: Path) -> Path:
    """The library with this bug in it."""
    for folder in ("csrc", "tests/emulator"):
        shutil.copytree(build.ROOT / folder, tree / folder)
    path = tree / mutant.file
    source = path.read_text()
    (spot,) = spots(mutant, source)
    path.write_text(source[: spot.start()] + mutant.replacement + source[spot.end() :])
    # What the suite does not use costs time: fp16, and some tiles.
    for launcher in (tree / "csrc/cuda").glob("*.cu"):
        launcher.write_text(launcher.read_text().replace("<ptx::f16>", "<ptx::bf16>"))
    if mutant.suite in ("sm80", "sm90", "group"):  # else down_proj takes what its plan says
        forget_unused_tiles(tree / "csrc/cuda/down_proj_plan.h")
    return build.build_mutant(tree, mutant.sources)


@pytest.fixture(scope="session", autouse=True)
def needs_a_compiler():
    pytest.importorskip("pybind11")
    if build.compiler() is None:
        pytest.skip("no C++ compiler")


def test_unchanged_sources_are_green(problems):
    done = run_suite(build.build(), problems, timeout=5 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "suite", ["sm90", *(pytest.param(s, marks=pytest.mark.slow) for s in ("sm80", "group"))]
)
def test_unchanged_copy_is_green(suite, problems, tmp_path):
    """Of what plant() leaves out nothing is missed: a bug is noticed for what it does."""
    some = next(m for m in KILLED if m.sources == mutants.BOTH)
    nothing = some._replace(replacement=some.text, suite=suite)
    done = run_suite(plant(nothing, tmp_path), problems, suite)
    assert done.returncode == 0, done.stdout + done.stderr


def is_slow(mutant: Mutant) -> bool:
    """One that needs plans and kernels compiled anew; of many most of the others too."""
    suites = ("forward", "passes", "grid", "parts", "grad80")
    if mutant.suite in suites and mutant.file.endswith((".h", ".cpp")):
        return True
    counts = {
        mutants: 8, mutants_forward: 13, mutants_backward: 22, mutants_group: 20,
        mutants_decode: 20, mutants_sm80_gemm: 24, mutants_sm80_grad: 20,
        mutants_launch: 20,
    }  # fmt: skip
    for many, fast in ((file.KILLED, n) for file, n in counts.items()):
        if mutant in many:
            return many.index(mutant) % fast != 0
    return False


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=pytest.mark.slow if is_slow(m) else ()) for m in KILLED],
    ids=lambda m: m.name.replace(" ", "_"),
)
def test_fault_44_planted_bug_turns_the_suite_red(mutant, problems, tmp_path):
    library = plant(mutant, tmp_path)
    try:
        done = run_suite(library, problems, mutant.suite)
    except subprocess.TimeoutExpired:
        return
    assert done.returncode != 0, "survived"


@pytest.mark.parametrize(
    "mutant, reason",
    [pytest.param(*s, marks=pytest.mark.slow if i % 4 else ()) for i, s in enumerate(SURVIVORS)],
    ids=lambda m: getattr(m, "name", None),
)
def test_known_survivors_survive(mutant, reason, problems, tmp_path):
    """If one is noticed after all, it belongs among the killed."""
    done = run_suite(plant(mutant, tmp_path), problems, mutant.suite)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted({m.file for m in ALL}))
def test_texts_occur_once(file):
    """Of mutants that stand in slow tests too: a change of the source shows at once."""
    source = (build.ROOT / file).read_text()
    stale = {m.name: n for m in ALL if m.file == file and (n := len(spots(m, source))) != 1}
    assert not stale, f"how often the text of each occurs: {stale}"


def test_enough_are_planted():
    assert len(KILLED) >= 20 and len({m.name for m in KILLED}) == len(KILLED)

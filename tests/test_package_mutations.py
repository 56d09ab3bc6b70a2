"""Each planted bug of the package's Python, Triton, C++ for CPUs and operators turns tests red."""

from __future__ import annotations

import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import cpu_library
import mutants_cpu
import mutants_cuda_operators
import mutants_python
import mutants_triton
import pytest
from emulator.build import ROOT
from forked_pytest import TESTS, Forks
from mutants import spots
from mutants_python import PackageMutant

from lora_kernels.schemas import has_kernel

pytestmark = [
    pytest.mark.xdist_group("package_mutations"),  # one process that forks
    pytest.mark.skipif(not has_kernel("forward", "CPU"), reason="no C++ library"),
]
FAST = {  # one in so many, or none
    mutants_python: 16, mutants_cpu: 26, mutants_triton: 36, mutants_cuda_operators: 0,
}  # fmt: skip
KILLED = [mutant for file in FAST for mutant in file.KILLED]
SAMPLE = [m for file, many in FAST.items() for m in (file.KILLED[::many] if many else ())]
SECONDS = 600
PASSED, FAILED = 0, 1  # exit statuses of pytest
CRASHED = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.close()


def arguments(tests: str) -> list[str]:
    words = [str(TESTS / w) if w.startswith("test_") else w for w in shlex.split(tests)]
    # Of the cases in Triton's interpreter `make test` runs a sample: no sample of theirs is a hole.
    markers = "not gpu" if "triton" in tests else "not gpu and not slow"
    return ["-m", markers, *words]


def copy_of(tree: Path, in_library: bool) -> None:
    """The package in `tree`; with `in_library`, its C++ sources in place of its library."""
    package, library = tree / "lora_kernels", "_C.abi3.so"
    shutil.copytree(ROOT / "lora_kernels", package, ignore=shutil.ignore_patterns("*.so", "__py*"))
    if in_library:
        shutil.copytree(ROOT / "csrc", tree / "csrc")
    else:
        (package / library).symlink_to(ROOT / "lora_kernels" / library)


def of_library(mutant: PackageMutant) -> bool:
    return mutant.file.startswith("csrc/")


def plant(mutant: PackageMutant, tree: Path) -> Path:
    """A copy of the package in `tree` with the bug in it; of C++, its CPU part compiled anew."""
    copy_of(tree, of_library(mutant))
    path = tree / mutant.file
    source = path.read_text()
    (spot,) = spots(mutant, source)
    path.write_text(source[: spot.start()] + mutant.replacement + source[spot.end() :])
    if of_library(mutant):
        cpu_library.build(tree, tree / "lora_kernels/_C.abi3.so")
    return tree


@pytest.mark.parametrize("in_library", [False, True], ids=["package", "library"])
@pytest.mark.parametrize("of", [SAMPLE, pytest.param(KILLED, marks=pytest.mark.slow)])
def test_an_unchanged_copy_is_green(of, in_library, forks, tmp_path):
    """A bug is noticed for what it does, and not for what a copy lacks."""
    copy_of(tmp_path, in_library)
    if in_library:
        cpu_library.build(tmp_path, tmp_path / "lora_kernels/_C.abi3.so")
    for tests in sorted({m.tests for m in of if of_library(m) == in_library}):
        status, output = forks.run(tmp_path, arguments(tests), SECONDS)
        assert status == PASSED, output


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=() if m in SAMPLE else pytest.mark.slow) for m in KILLED],
    ids=lambda m: m.name.replace(" ", "_"),
)
def test_planted_bug_turns_its_tests_red(mutant, forks, tmp_path):
    status, output = forks.run(plant(mutant, tmp_path), arguments(mutant.tests), SECONDS)
    assert status != PASSED, "survived"
    assert status == FAILED or status in CRASHED, output


@pytest.mark.parametrize("file", sorted({m.file for m in KILLED}))
def test_texts_occur_once(file):
    """Of mutants that stand in slow tests too: a change of the source shows at once."""
    source = (ROOT / file).read_text()
    stale = {m.name: n for m in KILLED if m.file == file and (n := len(spots(m, source))) != 1}
    assert not stale, f"how often the text of each occurs: {stale}"


def test_enough_are_planted():
    assert len(KILLED) >= 60 and len({m.name for m in KILLED}) == len(KILLED)

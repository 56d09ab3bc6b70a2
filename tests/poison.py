"""Tests in poisoned memory: `python tests/poison.py [arguments of pytest]`, or `-p poison`.

While a test runs, each allocation of torch's CPU allocator and of the C++ extension is one of
`guard_malloc.cpp`: full of NaN, and fenced, so that a kernel cannot leave it without a crash that
names the test. torch.utils.deterministic.fill_uninitialized_memory would fill outputs alone.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# What runs the CPU kernels on every shape, stride and dtype.
FILES = ("lora_linear", "kernels", "group", "dropout", "faults_shapes", "faults_values", "linear")
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


def build(folder: Path) -> Path:
    """The library to preload."""
    library = folder / "guard_malloc.so"
    source = TESTS / "guard_malloc.cpp"
    subprocess.run(["c++", *FLAGS, str(source), "-o", str(library)], check=True)
    return library


def preloaded(library: Path, command: Sequence[str], **options) -> subprocess.CompletedProcess:
    """`python command` with the guard, which is off until `guard_on`."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=env, cwd=TESTS.parent, **options)


def run(library: Path, arguments: Sequence[str], **options) -> subprocess.CompletedProcess:
    """pytest by this plugin; without arguments the fast tests of FILES."""
    files = ["-m", "not slow and not gpu", *(str(TESTS / f"test_{name}.py") for name in FILES)]
    command = ["-m", "pytest", "-q", "-p", "poison", "-p", "no:cacheprovider", "-n", "0"]
    return preloaded(library, [*command, *(arguments or files)], **options)


# ---- the plugin ----------------------------------------------------------------------------------


STDERR = os.dup(2)  # before pytest captures it: a crash leaves nobody to show what was captured


def guard() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    found.guard_count.restype = ctypes.c_int64
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    if not guard().guard_on(STDERR):
        pytest.exit("the guard finds no libc10.so or no extension in this process", 2)
    try:
        return (yield)
    finally:
        guard().guard_off()


def pytest_terminal_summary(terminalreporter):
    tensors, extension = (guard().guard_count(kind) for kind in (False, True))
    terminalreporter.write_line(f"guarded: {tensors} tensors, {extension} of the extension")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(build(Path(folder)), sys.argv[1:]).returncode)

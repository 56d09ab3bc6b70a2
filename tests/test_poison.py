"""The numeric tests on poisoned and fenced memory, and whether the fence holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import poison
import pytest
from emulator import build

import lora_kernels as lk

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the guard is made of Linux and glibc"),
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(lk.backends()["cpu"] is not None, reason="no C++ extension to guard"),
]
# Every shape and layout by the C++ kernels, in seconds.
SAMPLE = {
    "test_lora_linear.py": "cpu and (every_shape or strides and small)",
    "test_group.py": "cpu and every_shape and 0.3",
}
ENDS = {
    "nothing": ("0", ""),
    "write_past_the_end": ("SIGSEGV", "access at byte 4290 of an allocation of 4290"),
    "read_past_the_end": ("SIGSEGV", "access at byte 4290 of an allocation of 4290"),
    "write_before_the_start": ("SIGABRT", "a write was made at byte -2 of an allocation of 4290"),
    "read_once_freed": ("SIGSEGV", "access at byte 0 of a freed allocation of 4290"),
    "free_twice": ("SIGABRT", "a second or wrong free"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return poison.build(tmp_path_factory.mktemp("guard"))


def test_the_guard_catches_an_access_one_element_away(library):
    options = dict(capture_output=True, text=True, check=True)
    found = json.loads(poison.preloaded(library, ["tests/overruns.py"], **options).stdout)
    assert found.keys() == ENDS.keys()
    for name, (end, said) in ENDS.items():
        assert found[name][0] == end and said in found[name][1], name
    assert found["nothing"][1] == ""


def check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    guarded = re.search(r"guarded: (\d+) tensors, (\d+) of the extension", done.stdout)
    assert guarded and all(int(count) > 1000 for count in guarded.groups())


def test_the_kernels_stay_in_bounds_and_read_nothing_unwritten(library):
    files = [str(poison.TESTS / name) for name in SAMPLE]
    only = " or ".join(f"({name} and {cases})" for name, cases in SAMPLE.items())
    arguments = [*files, "-k", only, "-m", "not slow"]
    check(poison.run(library, arguments, capture_output=True, text=True))


@pytest.mark.slow
def test_every_numeric_test_passes_on_poisoned_memory(library):
    check(poison.run(library, [], capture_output=True, text=True))

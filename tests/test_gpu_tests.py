"""bench.gpu_tests: a process a file, so that one file's end is not another's."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import evidence, gpu_tests, stages
from bench.stages import Failed, Finished

MARK = "pytest.mark." + "gpu"  # not a text by which this file is found
FILES = {
    "test_zeros.py": "def test_right(): pass",
    "test_forward.py": f"def test_right(): pass\n@{MARK}\ndef test_wrong(): assert 0",
    "test_dropout.py": "def test_slow():\n    import time\n    time.sleep(60)",
    "test_broken.py": "import no_such_module\ndef test_it(): pass",
    "test_triton_it.py": "def test_it(): assert 0",
    "test_host.py": None,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name, body in FILES.items():
        marked = f"import pytest\npytestmark = {MARK}\n{body}\n"
        (tmp_path / name).write_text(marked if body else "def test_it(): assert 0")
    monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
    return tmp_path


def test_the_order_is_simple_kernels_first(folder, monkeypatch):
    names = [path.name for path in gpu_tests.files()]
    assert names == [
        "test_dropout.py", "test_forward.py", "test_broken.py", "test_triton_it.py", "test_zeros.py"
    ]  # fmt: skip
    monkeypatch.setattr(gpu_tests, "TESTS", Path(__file__).parent)
    real = [path.stem.removeprefix("test_") for path in gpu_tests.files()]
    assert tuple(real[: len(gpu_tests.FIRST)]) == gpu_tests.FIRST
    assert len(real) > len(gpu_tests.FIRST)


def test_one_file_s_end_is_not_another_s(folder, tmp_path, monkeypatch, capsys):
    reports = tmp_path / "reports"
    arguments = [str(reports), "-k", "not triton", "--seconds", "15", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu_tests", *arguments])
    assert gpu_tests.main() == 1
    said = capsys.readouterr().out
    for line in (
        "test_dropout.py: killed after 15 s", "test_forward.py: exit code 1",
        "test_zeros.py: exit code 0", "test_triton_it.py: exit code 5",
    ):  # fmt: skip
        assert line in said.splitlines()
    assert "test_broken.py: exit code" in said and "no_such_module" in said
    assert "test_slow" in said, "the log names what was running"
    log = tmp_path / "log"
    log.write_text(said)
    with pytest.raises(Failed, match=r"2 of 4 tests.*; test_dropout.py killed after 15 s"):
        evidence.tests(Finished(1, log), reports)


def test_what_there_is_no_time_for_is_not_begun(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(stages.DEADLINE, str(time.time() + gpu_tests.MARGIN - 1))
    monkeypatch.setattr(sys, "argv", ["gpu_tests", str(tmp_path / "reports")])
    assert gpu_tests.main() == 1
    assert capsys.readouterr().out.count("killed before it began") == 5


def test_what_runs_ends_with_the_stage(tmp_path):
    """A file of tests that is running is of the same group as what runs it."""
    child = "import os; print(os.getpgrp())"
    groups = []
    for own in (True, False):
        log = tmp_path / "log"
        command = [sys.executable, "-c", child]
        assert stages.execute(command, 60, log, {}, tmp_path, own_group=own) == 0
        groups.append(int(log.read_text().splitlines()[-1]))
    assert groups[0] != os.getpgrp() and groups[1] == os.getpgrp()
    started = time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert stages.execute(command, 1, log, {}, tmp_path, own_group=False) is None
    assert time.monotonic() - started < 30


def test_a_command_knows_when_its_stage_ends(tmp_path, monkeypatch):
    monkeypatch.delenv(stages.DEADLINE, raising=False)
    assert stages.seconds_left() == float("inf")
    ask = "from bench import stages; print(stages.seconds_left())"
    log = tmp_path / "log"

    def left(limit: float) -> float:
        assert stages.execute([sys.executable, "-c", ask], limit, log, {}, gpu_tests.ROOT) == 0
        return float(log.read_text().splitlines()[-1])

    assert 40 < left(100) < 100
    monkeypatch.setenv(stages.DEADLINE, str(time.time() + 60))
    assert left(100) < 60, "a stage within a stage ends with it"
    assert os.environ[stages.DEADLINE]

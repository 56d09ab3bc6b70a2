"""Stages: every kind of end is recorded, none takes another's time, a GPU's state is sampled."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu_state, stages, traffic  # noqa: E402
from bench.stages import Finished, NotRun, Stage  # noqa: E402


def python(source: str):
    return lambda: [sys.executable, "-c", source]


def run(tmp_path: Path, *some: Stage, monitor=None) -> list[dict]:
    (tmp_path / "logs").mkdir()
    return stages.run(some, tmp_path / "logs", ROOT, monitor)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_hang_is_killed_with_its_children_and_loses_no_other_stage(tmp_path):
    child = tmp_path / "child"
    hang = (
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    records = run(
        tmp_path,
        Stage("hang", 1.5, python(hang)),
        Stage("next", 20, python("print('here')")),
        Stage("dependent", 20, python(""), needs=("hang",)),
    )
    assert time.monotonic() - start < 20
    assert [r["status"] for r in records] == ["timed out", "passed", "not run"]
    assert records[0]["reason"] == "killed after 1.5 s"
    assert records[2]["reason"] == "hang timed out"
    assert not stages.succeeded(records)
    for _ in range(50):
        if not alive(int(child.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(child.read_text()))


def test_what_a_stage_leaves_of_its_limit_is_the_next_ones(tmp_path):
    def skipped() -> list[str]:
        raise NotRun("no need")

    wait = "import time; time.sleep(1)"
    records = run(
        tmp_path,
        Stage("skipped", 5, skipped),
        Stage("long", 0.5, python(wait)),
        Stage("hang", 0.5, python("import time; time.sleep(60)")),
        Stage("last", 20, python("")),
    )
    assert [r["status"] for r in records] == ["not run", "passed", "timed out", "passed"]
    assert records[1]["limit_s"] == 5.5 and records[3]["limit_s"] == 20
    assert records[2]["limit_s"] == pytest.approx(6 - records[1]["seconds"], abs=0.02)


def test_status_of_every_kind_of_end(tmp_path):
    def missing() -> list[str]:
        return [traffic.cuda_tool("no-such-tool")]

    def broken_judge(done: Finished) -> dict:
        return {}["absent"]

    records = run(
        tmp_path,
        Stage("fails", 20, python("print('why'); raise SystemExit(3)")),
        Stage("no tool", 20, missing),
        Stage("skips", 20, python("from bench.stages import skip; raise SystemExit(skip('no X'))")),
        Stage("no proof", 20, python(""), broken_judge),
        Stage("no program", 20, lambda: ["/nonexistent"]),
    )
    found = {r["name"]: (r["status"], r["reason"]) for r in records}
    assert found["fails"] == ("failed", "exit code 3: why")
    assert found["no tool"][0] == "not run" and "no-such-tool" in found["no tool"][1]
    assert found["skips"] == ("not run", "no X")
    assert found["no proof"] == ("failed", "KeyError: 'absent'")
    assert found["no program"][0] == "failed"
    assert not stages.succeeded(records)
    assert stages.succeeded([r for r in records if r["status"] == "not run"])
    lines = stages.table(records).splitlines()
    assert len(lines) == 6 and "exit code 3" in lines[1]


def test_gpu_state_is_sampled_and_a_dead_nvidia_smi_asked_once(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 41, [N/A], 100'\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_state, "PERIOD", 0.05)
    monitor = gpu_state.Monitor(program=str(program))
    stage = Stage("timing", 20, python("import time; time.sleep(0.5)"), sampled=True)
    begin = time.time()
    (record,) = run(tmp_path, stage, monitor=monitor)
    assert record["gpu"]["series"] and record["gpu"]["before"]["watts"] is None
    for at, *values in record["gpu"]["series"]:
        assert begin - 0.1 <= at <= time.time() and values == [1980, 2619, 41, None, 100]
    assert record["gpu"]["lowest"]["sm_mhz"] == record["gpu"]["after"]["sm_mhz"] == 1980
    program.write_text("#!/bin/sh\nexit 9\n")
    assert monitor.now() is None and "9" in monitor.problem
    program.unlink()
    assert monitor.now() is None and "9" in monitor.problem
    assert gpu_state.Monitor(program="no-such-smi").facts() == {"problem": "no no-such-smi"}

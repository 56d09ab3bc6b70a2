"""The GPU suite without a GPU: what each profile runs, within which limits, and the record."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.triton_kernels import digest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu_suite, profiles, provenance, publish, shapes  # noqa: E402
from bench.stages import NotRun  # noqa: E402


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_limits_leave_a_margin_below_ten_minutes(profile):
    limits = profiles.PROFILES[profile]
    assert sum(limits.values()) < 9.5 * 60
    suite = gpu_suite.Suite(Path(), Path(), False, limits, profile)
    assert [stage.name for stage in suite.stages()] == list(limits)


@pytest.mark.parametrize("command", ["SELFCHECK_TRITON", "TUNE"])
def test_what_stops_by_itself_does_so_within_its_limit(command):
    arguments = getattr(profiles, command)
    seconds = float(arguments[arguments.index("--seconds") + 1])
    stage = {"SELFCHECK_TRITON": "selfcheck-triton", "TUNE": "tune-triton"}[command]
    assert seconds < 0.8 * profiles.TRITON_LIMITS[stage]


def commands(profile: str, facts: dict) -> dict[str, str]:
    """What each stage would run, or why it would not."""
    found = gpu_suite.Suite(Path("out"), Path("logs"), True, profiles.PROFILES[profile], profile)
    found.facts = facts
    said = {}
    for stage in found.stages():
        try:
            said[stage.name] = " ".join(stage.command()[1:])
        except NotRun as why:
            said[stage.name] = f"not run: {why}"
    return said


def test_a_decoder_layer_and_a_fine_tune_need_peft_and_transformers():
    modules = ["rich", "matplotlib", "peft", "transformers"]
    facts = {"device_name": "NVIDIA Test", "modules": modules}
    found = commands("model", facts)
    for stage in ("model", "finetune"):
        assert found[stage].startswith(f"-m bench.bench_{stage} --backend cuda,")
        assert found[stage].endswith(f"--device cuda --json out/{stage}.json")
    for name in ("peft", "transformers"):
        left = facts | {"modules": [m for m in modules if m != name]}
        found = commands("model", left)
        assert all(f"no module {name}" in found[stage] for stage in ("model", "finetune"))


def test_the_sweep_takes_what_the_benchmarks_offer(tmp_path, monkeypatch):
    """Its arguments name layers, ranks and lengths that are there; ncu's CSV goes to the logs."""
    (tmp_path / "ncu").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = {"device_name": "NVIDIA Test", "modules": ["rich", "matplotlib"]}
    found = commands("sweep", facts)
    assert "--log-file logs/counters.csv" in found["counters"]
    assert found["counters"].endswith("-m bench.counters")
    assert "--plot logs/steps.png" in found["steps"]
    for name, arguments in (("sweep", profiles.SWEEP), ("steps", profiles.STEPS)):
        assert " ".join(arguments) in found[name]
        parser = argparse.ArgumentParser()
        for more in ("--mode", "--skip", "--backend"):
            parser.add_argument(more)
        monkeypatch.setattr(sys, "argv", arguments)
        cases = shapes.cases(shapes.parse(parser, {"cuda": 1.0, "cpu": 1.0}))
        layers = {(case.shape.n, case.shape.k) for case in cases}
        assert {(4096, 4096), (5120, 5120), (8192, 8192), (1024, 4096)} <= layers
        if name == "sweep":
            assert len(cases) == 12 * 4 * 5
            assert {case.shape.m for case in cases} == {2048, 4096, 8192, 16384}
            assert {case.rank for case in cases} == {8, 16, 32, 64, 128}


def test_tests_of_triton_run_with_triton_alone():
    modules = ["rich", "matplotlib", "pytest", "hypothesis", "numpy"]
    facts = {"device_name": "NVIDIA Test", "modules": modules, "triton": "3.7.1"}
    of_cuda, of_triton = (commands(profile, facts) for profile in ("cuda", "triton"))
    assert of_cuda["tests"] == "-m bench.gpu_tests logs/tests -k not triton"
    assert of_triton["triton"] == "-m bench.gpu_tests logs/triton -k triton"
    for stage in ("group", "layers"):
        assert "--backend cuda,composed" in of_cuda[stage], "Triton compiles in its own profile"
    assert "--backend triton" in of_triton["selfcheck-triton"]
    assert "--json out/selfcheck-triton.json" in of_triton["selfcheck-triton"]
    assert of_triton["tune-triton"].startswith("-m bench.tune_triton --dry-run")
    of_triton = commands("triton", {k: v for k, v in facts.items() if k != "triton"})
    names = set(profiles.TRITON_LIMITS) - {"probe", "build"}
    assert all("has no module triton" in of_triton[name] for name in names)
    assert "no module pytest" in commands("triton", facts | {"modules": []})["triton"]


def test_initcheck_alone_compares_nothing(tmp_path, monkeypatch):
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = commands("cuda", {"device_name": "NVIDIA Test", "modules": []})
    for tool in profiles.SANITIZERS:
        assert f"--tool {tool} --error-exitcode 1 " in found[tool]
        assert found[tool].endswith("--run-only") == (tool == "initcheck")


PATIENT = ["--limit", "probe=90"]  # where other tests keep the processors busy


def suite(*args: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "bench/gpu_suite.sh"), *args]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=120
    )


def test_without_a_gpu_nothing_passes_and_nothing_fails(tmp_path):
    done = suite(str(tmp_path / "out"), *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out/suite.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == list(profiles.LIMITS)
    assert {stage["status"] for stage in record["stages"]} == {"not run"}
    assert record["finished"] and len(record["sources_sha256"]) == 64 and record["commit"]
    assert not {"profile", "triton_sha256"} & set(record)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert "no CUDA device" in done.stdout
    again = suite(str(tmp_path / "out"))
    assert again.returncode == 2 and "not a new or empty directory" in again.stderr
    with pytest.raises(SystemExit, match="tests was not run"):
        publish.publish(tmp_path / "out", tmp_path / "results", allow_dirty=True)


@pytest.mark.parametrize("profile", [p for p in profiles.PROFILES if p != "cuda"])
def test_another_profile_without_a_gpu(profile, tmp_path):
    done = suite(str(tmp_path / "out"), f"--{profile}", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out/suite.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == list(profiles.PROFILES[profile])
    assert {stage["status"] for stage in record["stages"]} == {"not run"}
    assert record["profile"] == profile
    if profile == "triton":
        assert record["triton_sha256"] == digest.sources()
    assert len(list((tmp_path / "out").iterdir())) <= 8
    with pytest.raises(SystemExit, match=f"{profile} was not run"):
        publish.publish(tmp_path / "out", tmp_path / "results", allow_dirty=True)


def test_bad_arguments_and_the_list():
    assert "racecheck" in suite("--list").stdout and "triton" not in suite("--list").stdout
    assert "selfcheck-triton  " in suite("--list", "--triton").stdout
    assert "unknown stage racecheck" in suite("--triton", "--stages", "racecheck", "out").stderr
    assert "unknown stage x" in suite("--stages", "x", "out").stderr
    assert "not allowed with" in suite("--triton", "--model", "out").stderr
    assert suite().returncode == 2


def test_a_failing_stage_makes_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "_PROBE", "raise SystemExit(4)")
    monkeypatch.setattr(sys, "argv", ["gpu_suite", str(tmp_path / "out"), "--stages", "dram"])
    assert gpu_suite.main() == 1
    record = json.loads((tmp_path / "out/suite.json").read_text())
    assert [s["status"] for s in record["stages"]] == ["failed", "not run"]
    assert "exit code 4" in capsys.readouterr().out


def test_commit_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("LORA_KERNELS_COMMIT", raising=False)
    assert provenance.commit() == {"commit": "unknown", "dirty": None}
    monkeypatch.setenv("LORA_KERNELS_COMMIT", "abc-dirty")
    assert provenance.commit() == {"commit": "abc", "dirty": True}


def test_a_binary_older_than_its_sources_is_not_current(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.cu").write_text("a")
    (tmp_path / "setup.py").write_text("")
    binary = tmp_path / "_C.so"
    assert not provenance.is_current(binary, tmp_path)
    binary.write_bytes(b"no kernels")
    assert not provenance.is_current(binary, tmp_path)
    binary.write_bytes(b"...nv_fatbin...")
    assert provenance.is_current(binary, tmp_path)
    os.utime(binary, (1, 1))
    assert not provenance.is_current(binary, tmp_path)
    before = provenance.sources_hash(tmp_path)
    (tmp_path / "csrc/a.cu").write_text("b")
    assert provenance.sources_hash(tmp_path) != before

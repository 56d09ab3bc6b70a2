"""The GPU suite without a GPU: limits, what counts as proof, the record, and what is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from suite_facts import gemm_group

from lora_kernels import composed, schemas
from lora_kernels.triton_kernels import digest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    bench_backward,
    bench_gemm,
    bench_kernels,
    evidence,
    gpu_state,
    gpu_suite,
    plots,
    provenance,
    publish,
    stages,
    traffic,
)
from bench.stages import Failed, Finished, NotRun, Stage  # noqa: E402


def python(source: str):
    return lambda: [sys.executable, "-c", source]


def run(tmp_path: Path, *some: Stage, monitor=None) -> list[dict]:
    (tmp_path / "logs").mkdir()
    return stages.run(some, tmp_path / "logs", ROOT, monitor)


def finished(tmp_path: Path, text: str, code: int = 0) -> Finished:
    log = tmp_path / "stage.log"
    log.write_text(text)
    return Finished(code, log)


# ---- stages --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("profile", gpu_suite.PROFILES)
def test_limits_leave_a_margin_below_ten_minutes(profile):
    limits = gpu_suite.PROFILES[profile]
    assert sum(limits.values()) < 9.5 * 60
    suite = gpu_suite.Suite(Path(), Path(), False, limits, profile)
    assert [stage.name for stage in suite.stages()] == list(limits)


@pytest.mark.parametrize("command", ["SELFCHECK_TRITON", "TUNE"])
def test_what_stops_by_itself_does_so_within_its_limit(command):
    arguments = getattr(gpu_suite, command)
    seconds = float(arguments[arguments.index("--seconds") + 1])
    stage = {"SELFCHECK_TRITON": "selfcheck-triton", "TUNE": "tune-triton"}[command]
    assert seconds < 0.8 * gpu_suite.TRITON_LIMITS[stage]


def commands(profile: str, facts: dict) -> dict[str, str]:
    """What each stage would run, or why it would not."""
    found = gpu_suite.Suite(Path("out"), Path("logs"), True, gpu_suite.PROFILES[profile], profile)
    found.facts = facts
    said = {}
    for stage in found.stages():
        try:
            said[stage.name] = " ".join(stage.command()[1:])
        except NotRun as why:
            said[stage.name] = f"not run: {why}"
    return said


def test_a_decoder_layer_needs_peft_and_transformers():
    modules = ["rich", "matplotlib", "peft", "transformers"]
    facts = {"device_name": "NVIDIA Test", "modules": modules}
    assert commands("model", facts)["model"].startswith("-m bench.bench_model --backend cuda,")
    for name in ("peft", "transformers"):
        left = facts | {"modules": [m for m in modules if m != name]}
        assert f"no module {name}" in commands("model", left)["model"]


def test_tests_of_triton_run_with_triton_alone():
    modules = ["rich", "matplotlib", "pytest", "hypothesis", "numpy"]
    facts = {"device_name": "NVIDIA Test", "modules": modules, "triton": "3.7.1"}
    of_cuda, of_triton = (commands(profile, facts) for profile in ("cuda", "triton"))
    assert "-m pytest -m gpu -k not triton " in of_cuda["tests"]
    assert "-m pytest -m gpu -k triton " in of_triton["triton"]
    assert "--backend triton" in of_triton["selfcheck-triton"]
    assert "--json out/selfcheck-triton.json" in of_triton["selfcheck-triton"]
    assert of_triton["tune-triton"].startswith("-m bench.tune_triton --dry-run")
    of_triton = commands("triton", {k: v for k, v in facts.items() if k != "triton"})
    names = set(gpu_suite.TRITON_LIMITS) - {"probe", "build"}
    assert all("has no module triton" in of_triton[name] for name in names)
    assert "no module pytest" in commands("triton", facts | {"modules": []})["triton"]


# ---- what the tools leave ------------------------------------------------------------------------

CHECKED = "checked 4 calls of dropout_mask: 0 wrong\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
NO_RACE = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_sanitizer(tmp_path):
    banner = "========= COMPUTE-SANITIZER\n"
    done = finished(tmp_path, banner + CHECKED + CLEAN)
    assert evidence.sanitizer(done, "memcheck")["calls"] == 4
    done = finished(tmp_path, banner + CHECKED + NO_RACE)
    assert "shared memory only" in evidence.sanitizer(done, "racecheck")["headline"]
    done = finished(tmp_path, "refused 3 calls\n" + CHECKED + CLEAN)
    assert evidence.sanitizer(done, "memcheck")["refused"] == 3
    assert evidence.sanitizer(done, "memcheck")["headline"].endswith("dropout_mask, 3 refused")
    bad = [
        ("memcheck", banner + CHECKED, 0, "no summary"),  # the tool never attached
        ("memcheck", banner + CHECKED + NO_RACE, 0, "no summary"),
        ("racecheck", banner + NO_RACE, 139, "did not finish"),  # it died without a hazard
        ("memcheck", banner + CLEAN, 0, "did not finish"),
        ("memcheck", CHECKED + CLEAN, 1, "exit code 1"),
        ("memcheck", CHECKED.replace("0 wrong", "2 wrong") + CLEAN, 1, "2 of 4 calls"),
        (
            "memcheck", banner + "========= Invalid __global__ write of size 4 bytes\n" + CHECKED
            + CLEAN.replace("0 errors", "1 error"), 1, "1 errors: Invalid __global__ write",
        ),
        ("racecheck", CHECKED + NO_RACE.replace("0 hazards", "1 hazard"), 1, "1 errors"),
    ]  # fmt: skip
    for tool, text, code, why in bad:
        with pytest.raises(Failed, match=why):
            evidence.sanitizer(finished(tmp_path, text, code), tool)
    with pytest.raises(NotRun):
        evidence.sanitizer(finished(tmp_path, CHECKED.replace("4", "0") + CLEAN), "memcheck")


def test_pytest_report(tmp_path):
    report = tmp_path / "tests.xml"

    def judge(*cases: str, code: int = 0) -> dict:
        found = "".join(f'<testcase name="t{i}">{case}</testcase>' for i, case in enumerate(cases))
        report.write_text(f"<testsuites><testsuite>{found}</testsuite></testsuites>")
        return evidence.tests(finished(tmp_path, "", code), report)

    assert judge("", "", "<skipped/>")["headline"] == "2 tests, 1 skipped"
    with pytest.raises(Failed, match="1 of 2 tests, the first t1"):
        judge("", "<failure/>", code=1)
    with pytest.raises(Failed, match="exit code 3"):
        judge("", code=3)
    with pytest.raises(NotRun, match="1 were skipped"):
        judge("<skipped/>")
    with pytest.raises(NotRun, match="collected no test"):
        judge(code=evidence.NO_TESTS)
    report.unlink()
    with pytest.raises(Failed, match="no report"):
        evidence.tests(finished(tmp_path, "", 2), report)


def test_kernels_json_is_what_the_judge_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels.json"
    arguments = ["--shape", "16,24,32", "--rank", "4", "--dtype", "fp32", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--device", "cpu", "--json", str(path)])
    assert bench_kernels.main() == 0, capsys.readouterr().out
    if not schemas.has_kernel("down_proj", "CPU"):
        with pytest.raises(NotRun):
            evidence.kernels(finished(tmp_path, ""), path)
        return
    found = evidence.kernels(finished(tmp_path, ""), path)
    assert set(found["geometric_means"]) == set(bench_kernels.KERNELS)
    with pytest.raises(Failed):
        evidence.kernels(finished(tmp_path, "FAILED", 1), path)


def test_gemm_means_are_over_ours_and_left_out_calls_are_counted(tmp_path):
    path = tmp_path / "gemm.json"

    def judge(*groups: dict, code: int = 0) -> dict:
        path.write_text(json.dumps({"groups": groups, "summary": [{"name": "plain"}]}))
        return evidence.gemm(finished(tmp_path, "", code), path)

    refused = gemm_group(8, two_launches=1.2) | {"left_out": {"one_launch": "why"}}
    found = judge(gemm_group(4, one_launch=1.01, two_launches=1.2), refused)
    assert found["headline"] == (
        "plain 1.100x vendor, one_launch 1.010x plain, two_launches 1.200x plain, "
        "1 calls not served"
    )
    assert found["left_out"] == 1 and found["means"] == [{"name": "plain"}]
    with pytest.raises(Failed, match="exit code 1"):
        judge(refused, code=1)
    ours = gemm_group(4)
    ours["rows"] = [row for row in ours["rows"] if "plan" not in row]
    with pytest.raises(NotRun, match="no form"):
        judge(ours)


def test_gemm_json_is_what_the_judge_reads(tmp_path, monkeypatch):
    path = tmp_path / "gemm.json"
    arguments = ["--shape", "16,24,32", "--rank", "4", "--rounds", "3", "--device", "cpu"]
    ops = torch.ops.lora_kernels
    monkeypatch.setattr(sys, "argv", ["bench_gemm", *arguments, "--json", str(path)])
    monkeypatch.setattr(bench_gemm, "built", lambda device: False)
    assert bench_gemm.main() == 0
    with pytest.raises(NotRun, match="no form"):
        evidence.gemm(finished(tmp_path, ""), path)
    monkeypatch.setattr(bench_gemm, "built", lambda device: True)
    monkeypatch.setattr(ops, "forward_as", lambda *a: composed.forward(*a[:-3]), raising=False)
    monkeypatch.setattr(ops, "forward_plan", lambda *a: "a plan", raising=False)
    assert bench_gemm.main() == 0
    found = evidence.gemm(finished(tmp_path, ""), path)
    assert all(name in found["headline"] for name in bench_gemm.OURS)
    result = json.loads(path.read_text())
    plots.plot_gemm(tmp_path / "gemm.png", result["groups"], result["environment"])
    assert (tmp_path / "gemm.png").stat().st_size > 0


def test_backward_json_is_what_the_judge_reads(tmp_path, monkeypatch):
    path = tmp_path / "backward.json"
    arguments = ["--shape", "16,24,32", "--rank", "4,8", "--rounds", "3", "--device", "cpu"]
    ops = torch.ops.lora_kernels
    monkeypatch.setattr(sys, "argv", ["bench_backward", *arguments, "--json", str(path)])
    monkeypatch.setattr(bench_gemm, "built", lambda *_: False)
    assert bench_backward.main() == 0
    with pytest.raises(NotRun, match="no form"):
        evidence.gemm(finished(tmp_path, ""), path)
    monkeypatch.setattr(bench_gemm, "built", lambda *_: True)
    monkeypatch.setattr(ops, "backward_as", lambda *a: composed.backward(*a[:-3]), raising=False)
    plan = "passes; 4.5 % over the frozen GEMM of dx by the model"
    monkeypatch.setattr(ops, "backward_plan", lambda *a: plan, raising=False)
    assert bench_backward.main() == 0
    found = evidence.gemm(finished(tmp_path, ""), path)
    assert all(name in found["headline"] for name in bench_backward.OURS)
    assert "alone" not in found["headline"]
    result = json.loads(path.read_text())
    plots.plot_backward(tmp_path / "b.png", result["groups"], result["environment"])
    assert (tmp_path / "b.png").stat().st_size > 0


def test_eager_counterparts_compute_what_the_kernels_do():
    x, w, h, a, b = (torch.randn(s) for s in ((6, 8), (5, 8), (6, 3), (3, 8), (5, 3)))
    for kernel, tensors, more in (
        ("down_proj", (x, a), ()),
        ("fused_gemm", (x, w, h, b, None), ()),
        ("weight_grad", (h, x), (False, False)),
    ):
        want = getattr(composed, kernel)(*tensors, None, 0, 1.5, *more)
        torch.testing.assert_close(bench_kernels.eager(kernel, tensors, 1.5, 0.0), want)


def test_gpu_state_is_sampled_and_a_dead_nvidia_smi_asked_once(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 41, [N/A], 100'\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_state, "PERIOD", 0.05)
    monitor = gpu_state.Monitor(program=str(program))
    stage = Stage("timing", 20, python("import time; time.sleep(0.5)"), sampled=True)
    (record,) = run(tmp_path, stage, monitor=monitor)
    assert record["gpu"]["samples"] > 0 and record["gpu"]["before"]["watts"] is None
    assert record["gpu"]["lowest"]["sm_mhz"] == record["gpu"]["after"]["sm_mhz"] == 1980
    program.write_text("#!/bin/sh\nexit 9\n")
    assert monitor.now() is None and "9" in monitor.problem
    program.unlink()
    assert monitor.now() is None and "9" in monitor.problem
    assert gpu_state.Monitor(program="no-such-smi").facts() == {"problem": "no no-such-smi"}


def test_means_of_a_decoder_layer_are_over_peft_and_frozen(tmp_path):
    path = tmp_path / "model.json"

    def judge(*rows: dict, code: int = 0) -> dict:
        path.write_text(json.dumps({"groups": [{"rows": list(rows)}]}))
        return evidence.model(finished(tmp_path, "", code), path)

    peft = {"name": "peft", "of_peft": 1.0, "over_frozen": 1.5}
    found = judge(peft, {"name": "applied", "of_peft": 0.8, "over_frozen": 1.2})
    assert found["headline"] == "applied 0.800x peft 1.200x frozen"
    with pytest.raises(NotRun, match="no layer"):
        judge(peft)
    with pytest.raises(Failed, match="exit code 1"):
        judge(peft, code=1)


# ---- the command ---------------------------------------------------------------------------------


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
    assert [stage["name"] for stage in record["stages"]] == list(gpu_suite.LIMITS)
    assert {stage["status"] for stage in record["stages"]} == {"not run"}
    assert record["finished"] and len(record["sources_sha256"]) == 64 and record["commit"]
    assert not {"profile", "triton_sha256"} & set(record)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert "no CUDA device" in done.stdout
    again = suite(str(tmp_path / "out"))
    assert again.returncode == 2 and "not a new or empty directory" in again.stderr
    with pytest.raises(SystemExit, match="tests was not run"):
        publish.publish(tmp_path / "out", tmp_path / "results", allow_dirty=True)


@pytest.mark.parametrize("profile", gpu_suite.OTHERS)
def test_another_profile_without_a_gpu(profile, tmp_path):
    done = suite(str(tmp_path / "out"), f"--{profile}", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out/suite.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == list(gpu_suite.PROFILES[profile])
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

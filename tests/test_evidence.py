"""What the suite takes for proof of what the tools and benchmarks leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from suite_facts import finished, gemm_group, make_out

from lora_kernels import composed, schemas

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import bench_backward, bench_gemm, bench_kernels, evidence, plots  # noqa: E402
from bench.stages import Failed, NotRun  # noqa: E402

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
    done = finished(tmp_path, "no time for 7 calls\n" + CHECKED.replace("checked", "ran") + CLEAN)
    found = evidence.sanitizer(done, "initcheck")
    assert found["unchecked"] == 7 and found["headline"].endswith("dropout_mask, no time for 7")
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


def test_reports_of_test_files(tmp_path):
    reports = tmp_path / "reports"
    reports.mkdir()

    def judge(*cases: str, code: int = 0, said: str = "test_a.py: exit code 0\n") -> dict:
        """Two files: one of `cases`, and one of a test that passed."""
        found = "".join(f'<testcase name="t{i}">{case}</testcase>' for i, case in enumerate(cases))
        for name, of in (("test_a", found), ("test_b", '<testcase name="b"/>' * bool(cases))):
            text = f"<testsuites><testsuite>{of}</testsuite></testsuites>"
            (reports / f"{name}.xml").write_text(text)
        return evidence.tests(finished(tmp_path, said, code), reports)

    both = "test_a.py: exit code 0\ntest_b.py: exit code 0\n"
    found = judge("", "", "<skipped/>", said=both)
    assert found["headline"] == "3 tests of 2 files, 1 skipped"
    with pytest.raises(Failed, match=r"1 of 3 tests, the first t1$"):
        judge("", "<failure/>", code=1)
    with pytest.raises(Failed, match=r"0 of 2 tests; test_a\.py killed after 9 s$"):
        judge("", code=1, said="test_a.py: killed after 9 s\n")
    with pytest.raises(Failed, match=r"exit code 1: test_a\.py: exit code 2"):  # it did not import
        judge("", code=1, said="test_a.py: exit code 2\n")
    with pytest.raises(NotRun, match="no test is marked"):
        judge(code=0)
    for report in reports.iterdir():
        report.unlink()
    (reports / "test_a.xml").write_text("<a><testcase name='t'><skipped/></testcase></a>")
    with pytest.raises(NotRun, match="1 were skipped"):
        evidence.tests(finished(tmp_path, both), reports)


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


def test_peaks_of_memory_are_over_eager_s(tmp_path):
    path = tmp_path / "memory.json"

    def judge(*rows: dict) -> dict:
        path.write_text(json.dumps({"groups": [{"rows": list(rows)}]}))
        return evidence.memory(finished(tmp_path, ""), path)

    eager = {"name": "eager", "peak_bytes": 8}
    found = judge({"name": "frozen", "peak_bytes": 1}, eager, {"name": "cuda", "peak_bytes": 4})
    assert found["headline"] == "cuda 0.500x peak of eager"
    with pytest.raises(NotRun, match="no peak"):
        judge({"name": "eager"}, {"name": "cuda"})


def test_pictures_are_drawn_beside_their_file(tmp_path, monkeypatch, capsys):
    out = make_out(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["plots", str(out / "kernels.json")])
    assert plots.main() == 0
    assert {path.name for path in out.glob("*.png")} == {"kernels.png", "roofline.png"}
    monkeypatch.setattr(sys, "argv", ["plots", str(out / "suite.json")])
    with pytest.raises(SystemExit):
        plots.main()
    assert "got suite.json; expected one of layers.json" in capsys.readouterr().err


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

"""What `bench.publish` takes for evidence, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import suite_facts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import performance, profiles, publish  # noqa: E402

# ---- publishing ----------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    return suite_facts.make_out(tmp_path / "out")


def edit(out: Path, change) -> None:
    record = json.loads((out / "suite.json").read_text())
    change(record)
    (out / "suite.json").write_text(json.dumps(record))


def set_status(name: str, status: str):
    def change(record: dict) -> None:
        next(stage for stage in record["stages"] if stage["name"] == name)["status"] = status

    return change


def test_publish(out, tmp_path):
    folder = publish.publish(out, tmp_path / "results")
    assert folder.name == "cuda-nvidia-test-1"
    assert {path.name for path in folder.iterdir()} == set(publish.entry("cuda"))
    with pytest.raises(SystemExit, match="--replace"):
        publish.publish(out, tmp_path / "results")
    assert json.loads((folder / "selfcheck.json").read_text()) == {"of": "cuda"}
    edit(out, set_status("layers", "not run"))
    edit(out, set_status("selfcheck", "not run"))
    publish.publish(out, tmp_path / "results", replace=True)
    assert not (folder / "layers.json").exists() and (folder / "kernels.png").exists()
    assert not (folder / "selfcheck.json").exists()


@pytest.mark.parametrize(
    ("change", "why", "dirt"),
    [
        (set_status("tests", "failed"), "tests failed", False),
        (set_status("layers", "timed out"), "layers timed out", False),
        (set_status("racecheck", "not run"), "racecheck was not run", False),
        (lambda record: record.update(finished=False), "cut off", False),
        (lambda record: record.update(dirty=True), "not that of commit abc", True),
        (lambda record: record.update(dirty=None), "nobody knows", True),
        (lambda record: record.update(sources_sha256="0"), "not that of this tree", True),
        (set_status("build", "not run"), "took a binary", True),
    ],
)
def test_publish_refuses_what_is_no_evidence(out, tmp_path, change, why, dirt):
    edit(out, change)
    with pytest.raises(SystemExit, match=why):
        publish.publish(out, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    if dirt:
        publish.publish(out, tmp_path / "results", allow_dirty=True)
    else:
        with pytest.raises(SystemExit, match=why):
            publish.publish(out, tmp_path / "results", allow_dirty=True)


@pytest.mark.parametrize("status", ["not run", "failed"])
def test_a_sanitizer_can_be_excused_with_a_reason_that_is_published(
    out, tmp_path, monkeypatch, capsys, status
):
    def excuse(*reasons: str) -> None:
        found = [f"--excuse={reason}" for reason in reasons]
        target = ["--results", str(tmp_path / "results"), "--allow-dirty"]
        monkeypatch.setattr(sys, "argv", ["publish", str(out), *target, *found])
        publish.main()

    def change(record: dict) -> None:
        set_status("racecheck", status)(record)
        next(s for s in record["stages"] if s["name"] == "racecheck")["reason"] = "3 errors"

    edit(out, change)
    for wrong in ("racecheck", "racecheck= ", "tests=slow"):
        with pytest.raises(SystemExit):
            excuse(wrong)
        assert "expected STAGE=REASON, STAGE of memcheck, " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="racecheck"):
        excuse("memcheck=another")
    excuse("racecheck=it blames an mbarrier")
    (folder,) = (tmp_path / "results").iterdir()
    record = json.loads((folder / "suite.json").read_text())
    assert record["excused"] == {"racecheck": "it blames an mbarrier"}
    assert publish.objections(record) == [], "and so has the automatic choice none"
    said = "\n".join(performance.suite(folder / "suite.json"))
    assert f"| racecheck | {status} | excused: it blames an mbarrier; 3 errors |" in said
    record["excused"] = {"tests": "slow"}
    set_status("tests", "failed")(record)
    assert "stage tests failed" in publish.objections(record), "nothing but a tool is excused"


# ---- publishing the other profiles ---------------------------------------------------------------


@pytest.fixture
def out_triton(tmp_path):
    return suite_facts.make_out_triton(tmp_path / "out-triton")


@pytest.fixture
def out_sweep(tmp_path):
    return suite_facts.make_out_sweep(tmp_path / "out-sweep")


@pytest.fixture
def out_model(tmp_path):
    return suite_facts.make_out_model(tmp_path / "out-model")


def test_profiles_are_published_beside_each_other(out, out_triton, out_model, out_sweep, tmp_path):
    """In any order after the CUDA kernels' own; each replaces its own files alone."""
    outs = {"cuda": out, "sweep": out_sweep, "model": out_model, "triton": out_triton}
    every = {name for profile in profiles.PROFILES for name in publish.entry(profile)}
    for first in outs:
        results = tmp_path / f"results-{first}"
        for profile in dict.fromkeys(("cuda", first, *outs)):
            folder = publish.publish(outs[profile], results)
        assert {path.name for path in folder.iterdir()} == every
        for profile in profiles.PROFILES:
            suite = json.loads((folder / publish.RECORDS[profile]).read_text())
            assert publish.profile_of(suite) == profile
            with pytest.raises(SystemExit, match="--replace"):
                publish.publish(outs[profile], results)
            before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
            publish.publish(outs[profile], results, replace=True)
            changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
            assert changed == set(publish.entry(profile))


@pytest.mark.parametrize("profile", publish.OF_CUDA)
def test_times_of_kernels_that_nothing_proves_are_refused(profile, out, tmp_path):
    other = suite_facts.MAKERS[profile](tmp_path / "other")
    results = tmp_path / "results"
    with pytest.raises(SystemExit, match="publish the profile `cuda` first"):
        publish.publish(other, results)
    folder = publish.publish(out, results)
    for change, why in (
        (lambda record: record.update(sources_sha256="0"), "of other kernel sources"),
        (set_status("tests", "failed"), "does not prove these kernels right"),
    ):
        before = (folder / "suite.json").read_text()
        record = json.loads(before)
        change(record)
        (folder / "suite.json").write_text(json.dumps(record))
        with pytest.raises(SystemExit, match=why):
            publish.publish(other, results)
        (folder / "suite.json").write_text(before)
    publish.publish(other, results)


def test_a_side_stage_that_failed_can_be_excused_and_leaves_no_file(out, tmp_path):
    publish.publish(out, tmp_path / "results")
    other = suite_facts.make_out_sweep(tmp_path / "other")
    edit(other, set_status("memory", "timed out"))
    with pytest.raises(SystemExit, match="stage memory timed out"):
        publish.publish(other, tmp_path / "results")
    folder = publish.publish(other, tmp_path / "results", excuses={"memory": "slow disk"})
    assert (folder / "sweep.json").exists() and not (folder / "memory.json").exists()
    assert {"tests", "sweep", "triton", "model", "build"}.isdisjoint(publish.EXCUSABLE)


def test_a_decoder_layer_is_no_evidence_of_another_binary(out_model, tmp_path):
    edit(out_model, set_status("build", "not run"))
    with pytest.raises(SystemExit, match="took a binary"):
        publish.publish(out_model, tmp_path / "results")
    edit(out_model, set_status("model", "failed"))
    with pytest.raises(SystemExit, match="stage model failed"):
        publish.publish(out_model, tmp_path / "results", allow_dirty=True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (set_status("triton", "failed"), "triton failed"),
        (set_status("triton", "not run"), "triton was not run"),
        (set_status("tune-triton", "timed out"), "tune-triton timed out"),
        (lambda record: record.update(finished=False), "cut off"),
        (lambda record: record.update(dirty=True), "not that of commit abc"),
        (lambda record: record.update(triton_sha256="0"), "Triton kernels are not those of this"),
        (lambda record: record["device"].update(triton="3.8.0"), "are not those of this tree"),
        (lambda record: record.update(profile="cuda"), "tests was not run"),
    ],
)
def test_publish_refuses_what_is_no_evidence_of_triton(out_triton, tmp_path, change, why):
    edit(out_triton, change)
    with pytest.raises(SystemExit, match=why):
        publish.publish(out_triton, tmp_path / "results")
    assert not (tmp_path / "results").exists()

"""What `bench.publish` takes for evidence, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from suite_facts import gemm_group, group_table

from lora_kernels.triton_kernels import digest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    gpu_suite,
    publish,
)

# ---- publishing ----------------------------------------------------------------------------------


def timed(name: str, ms: float, **more) -> dict:
    return {"name": name, "median_ms": ms, "q1_ms": ms, "q3_ms": ms, **more}


@pytest.fixture
def out(tmp_path):
    """An OUT in which every stage passed; its numbers are made up."""
    folder = tmp_path / "out"
    folder.mkdir()
    machine = {"device": "cuda", "device_name": "NVIDIA Test (1)", "torch": "0"}
    shape = {"label": "model q/o", "m": 8, "n": 8, "k": 8, "rank": 1, "dtype": "bf16"}
    call = {"kernel": "down_proj", "what": "h", "dropout": 0.1, **shape}
    rows = [timed(name, 1.0) for name in ("kernel", "composed", "torch", "copy")]
    kernels = {"environment": machine, "groups": [call | {"rows": rows}]}
    layer = {"mode": "fwd+bwd", "dropout": 0.0, "automatic": "composed", **shape}
    rows = [timed(name, 1.0) for name in ("frozen", "peft", "composed")]
    layers = {"environment": machine, "groups": [layer | {"rows": rows}]}
    record = {
        "schema": gpu_suite.SCHEMA, "finished": True, "commit": "abc", "dirty": False,
        "sources_sha256": gpu_suite.sources_hash(), "binary_sha256": "0",
        "device": {"device_name": machine["device_name"]},
        "stages": [{"name": name, "status": "passed"} for name in gpu_suite.LIMITS],
    }  # fmt: skip
    groups = [gemm_group(4, one_launch=1.01, two_launches=1.1), gemm_group(8, two_launches=1.2)]
    gemm = {"environment": machine, "groups": groups}
    groups = [gemm_group(16, passes=1.2, one_grid=1.05), gemm_group(128, passes=1.3)]
    backward = {"environment": machine, "groups": groups}
    group = {"environment": machine, "groups": [group_table(p) for p in (0.0, 0.1)]}
    files = {"kernels": kernels, "layers": layers, "gemm": gemm, "backward": backward}
    files |= {"group": group, "suite": record, "selfcheck": {"of": "cuda"}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


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
    assert {path.name for path in folder.iterdir()} == set(publish.ENTRIES["cuda"])
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


def test_a_missing_tool_can_be_allowed(out, tmp_path):
    edit(out, set_status("racecheck", "not run"))
    publish.publish(out, tmp_path / "results", allow_not_run=["racecheck"])


# ---- publishing the other profiles ---------------------------------------------------------------


def other_out(folder: Path, profile: str, files: dict[str, dict], **more) -> Path:
    """An OUT of another profile, on the device of `out`, in which every stage passed."""
    folder.mkdir()
    record = {
        "schema": gpu_suite.SCHEMA, "finished": True, "commit": "abc", "dirty": False,
        "sources_sha256": gpu_suite.sources_hash(), "binary_sha256": None, "profile": profile,
        "device": {"device_name": "NVIDIA Test (1)", "triton": "3.7.1"},
        "stages": [{"name": name, "status": "passed"} for name in gpu_suite.PROFILES[profile]],
    }  # fmt: skip
    for name, content in {"suite": record | more, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def out_triton(tmp_path):
    files = {"selfcheck-triton": {"of": "the suite of triton"}}
    digests = {"sources_sha256": "0", "triton_sha256": digest.of_version("3.7.1")}
    return other_out(tmp_path / "out-triton", "triton", files, **digests)


@pytest.fixture
def out_model(tmp_path):
    rows = [timed(name, 1.0, of_peft=1.0) for name in ("peft", "applied")]
    case = {"model": "m", "tokens": 8, "dtype": "bf16", "adapters": "same", "rank": 1, "dropout": 0}
    machine = {"device_name": "NVIDIA Test (1)", "torch": "0"}
    model = {"environment": machine, "groups": [case | {"rows": rows}]}
    return other_out(tmp_path / "out-model", "model", {"model": model})


def test_profiles_are_published_beside_each_other(out, out_triton, out_model, tmp_path):
    """In any order; each replaces its own files alone."""
    outs = {"cuda": out, "triton": out_triton, "model": out_model}
    every = {name for entry in publish.ENTRIES.values() for name in entry}
    for first in outs:
        results = tmp_path / f"results-{first}"
        for profile in (first, *(other for other in outs if other != first)):
            folder = publish.publish(outs[profile], results)
        assert {path.name for path in folder.iterdir()} == every
        for profile, entry in publish.ENTRIES.items():
            suite = json.loads((folder / entry[0]).read_text())
            assert publish.profile_of(suite) == profile
            with pytest.raises(SystemExit, match="--replace"):
                publish.publish(outs[profile], results)
            before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
            publish.publish(outs[profile], results, replace=True)
            changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
            assert changed == set(entry)


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

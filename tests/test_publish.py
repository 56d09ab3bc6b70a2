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
        "stages": [
            {"name": name, "status": "passed"}
            for name in {**gpu_suite.LIMITS, publish.SELFCHECKS["triton"]: 0}
        ],
    }  # fmt: skip
    groups = [gemm_group(4, one_launch=1.01, two_launches=1.1), gemm_group(8, two_launches=1.2)]
    gemm = {"environment": machine, "groups": groups}
    groups = [gemm_group(16, passes=1.2, one_grid=1.05), gemm_group(128, passes=1.3)]
    backward = {"environment": machine, "groups": groups}
    group = {"environment": machine, "groups": [group_table(p) for p in (0.0, 0.1)]}
    files = {"kernels": kernels, "layers": layers, "gemm": gemm, "backward": backward}
    files |= {"group": group, "suite": record}
    files |= {name: {"of": backend} for backend, name in publish.SELFCHECKS.items()}
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
    assert {path.name for path in folder.iterdir()} == set(publish.ENTRY)
    with pytest.raises(SystemExit, match="--replace"):
        publish.publish(out, tmp_path / "results")
    for backend, name in publish.SELFCHECKS.items():
        assert json.loads((folder / f"{name}.json").read_text()) == {"of": backend}
    edit(out, set_status("layers", "not run"))
    edit(out, set_status(publish.SELFCHECKS["triton"], "not run"))
    publish.publish(out, tmp_path / "results", replace=True)
    assert not (folder / "layers.json").exists() and (folder / "kernels.png").exists()
    assert not (folder / "selfcheck-triton.json").exists() and (folder / "selfcheck.json").exists()


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


# ---- publishing what was found of Triton ---------------------------------------------------------


@pytest.fixture
def out_triton(tmp_path):
    """An OUT of --triton, on the device of `out`, in which every stage passed."""
    folder = tmp_path / "out-triton"
    folder.mkdir()
    record = {
        "schema": gpu_suite.SCHEMA, "finished": True, "commit": "abc", "dirty": False,
        "sources_sha256": "0", "binary_sha256": None, "profile": "triton",
        "triton_sha256": digest.of_version("3.7.1"),
        "device": {"device_name": "NVIDIA Test (1)", "triton": "3.7.1"},
        "stages": [{"name": name, "status": "passed"} for name in gpu_suite.TRITON_LIMITS],
    }  # fmt: skip
    (folder / "suite.json").write_text(json.dumps(record))
    (folder / "selfcheck-triton.json").write_text(json.dumps({"of": "the suite of triton"}))
    return folder


def test_triton_is_published_beside_cuda(out, out_triton, tmp_path):
    """In either order; each replaces its own files alone."""
    own, of_cuda = set(publish.ENTRY_TRITON), set(publish.ENTRY) - {"selfcheck-triton.json"}
    for first, second in ((out_triton, out), (out, out_triton)):
        results = tmp_path / f"results-{first.name}"
        edit(out, set_status(publish.SELFCHECKS["triton"], "not run"))
        folder = publish.publish(first, results)
        assert publish.publish(second, results) == folder
        assert {path.name for path in folder.iterdir()} == own | of_cuda
        suites = [
            json.loads((folder / f"{name}.json").read_text()) for name in ("suite-triton", "suite")
        ]
        assert [publish.profile_of(suite) for suite in suites] == ["triton", "cuda"]
        assert publish.suite_of(folder, "triton").name == "suite-triton.json"
        assert publish.suite_of(folder, "cuda").name == "suite.json"
        for again in (out, out_triton):
            with pytest.raises(SystemExit, match="--replace"):
                publish.publish(again, results)
        edit(out, set_status(publish.SELFCHECKS["triton"], "passed"))
        publish.publish(out, results, replace=True)
        found = json.loads((folder / "selfcheck-triton.json").read_text())
        assert found == {"of": "the suite of triton"}, "not what another run measured"


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

"""The shipped table: the hash that its rows carry, and the evidence that they come from."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dispatch_facts import EMPTY, GPU, INSIDE, SOURCES, points, record
from includes import closure

from lora_kernels import dispatch, machine, records, verdicts
from lora_kernels.triton_kernels import digest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import dispatch as generator  # noqa: E402
from bench import gpu_suite, profiles, provenance  # noqa: E402

BF16 = torch.bfloat16
TRITON = "3.7.1"
OF_TRITON = GPU._replace(sources=digest.of_version(TRITON))

# ---- the hash of the kernels' sources ------------------------------------------------------------


def test_the_hash_sees_every_file_that_kernels_and_plans_include(tmp_path):
    csrc = tmp_path / "csrc"
    for name in ("lora.h", "philox.h", "cuda/a.cu", "cuda/deep/b.h", "torch/cuda.cpp"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text("before")
    (tmp_path / "csrc/digest.py").write_bytes((ROOT / "csrc/digest.py").read_bytes())
    first = generator.kernel_sources(tmp_path)
    for name in ("lora.h", "philox.h", "cuda/a.cu", "cuda/deep/b.h"):
        (csrc / name).write_text("// a comment")
        changed = generator.kernel_sources(tmp_path)
        assert changed != first, name
        first = changed
    (csrc / "torch/cuda.cpp").write_text("no kernel")
    assert generator.kernel_sources(tmp_path) == first
    (csrc / "cuda/a.cu").rename(csrc / "cuda/c.cu")
    assert generator.kernel_sources(tmp_path) != first
    kernels = (ROOT / "csrc/cuda").rglob("*.c*")
    included = {p for source in kernels for p in closure(source, [ROOT / "csrc"])}
    hashed = {ROOT / "csrc/lora.h", ROOT / "csrc/philox.h", *(ROOT / "csrc/cuda").rglob("*")}
    assert included <= hashed, "a kernel is made of a file that the hash does not see"


@pytest.mark.skipif(not machine.sources(), reason="built without nvcc")
def test_the_library_says_what_its_kernels_were_built_from():
    assert re.fullmatch("[0-9a-f]{64}", machine.sources())
    if provenance.is_current():
        assert machine.sources() == generator.kernel_sources()


def test_the_hash_of_triton_sees_every_file_of_its_folder_and_its_version(tmp_path):
    for name in ("__init__.py", "down_proj.py", "deep/tiles.json", "down_proj.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    first = digest.of_version(TRITON, tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert digest.of_version("3.7.2", tmp_path) != first
    (tmp_path / "down_proj.pyc").write_text("compiled")
    assert digest.of_version(TRITON, tmp_path) == first
    for name in ("__init__.py", "down_proj.py", "deep/tiles.json"):
        (tmp_path / name).write_text("# a comment")
        assert digest.of_version(TRITON, tmp_path) != first, name
        (tmp_path / name).write_text("before")
    assert digest.of_version(TRITON, tmp_path) == first
    (tmp_path / "down_proj.py").rename(tmp_path / "up_proj.py")
    assert digest.of_version(TRITON, tmp_path) != first


def test_the_hash_of_triton_is_that_of_the_installed_one(monkeypatch):
    monkeypatch.setattr(digest.metadata, "version", lambda name: {"triton": TRITON}[name])
    assert machine.sources("triton") == digest.sources() == digest.of_version(TRITON)
    assert machine.sources("triton") == generator.triton_sources({"device": {"triton": TRITON}})

    def none(name):
        raise digest.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(digest.metadata, "version", none)
    assert digest.sources() == "", "no kernel without Triton"


def test_the_hash_needs_no_import_of_triton():
    code = f"import runpy, sys; runpy.run_path({digest.__file__!r})['sources'](); "
    code += "assert 'triton' not in sys.modules and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("driver", ["6.12.12\n", None])
def test_the_facts_of_a_device_of_rocm(monkeypatch, driver):
    """Its type is "cuda", its versions are HIP's and amdgpu's."""
    facts = {"get_device_name": "AMD Instinct Test", "get_device_capability": (9, 4)}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.version, "hip", "7.0.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    files = {"/sys/module/amdgpu/version": driver} if driver else {}
    monkeypatch.setattr(machine, "_text", lambda path: files.get(path, ""))
    found = machine.of.__wrapped__(torch.device("cuda", 0), "triton")
    assert found[:4] == ("AMD Instinct Test", "9.4", str(torch.__version__), "HIP 7.0.1")
    release = f"{platform.system()} {platform.release()}"
    assert found.driver == ("6.12.12" if driver else release)
    assert found.is_gpu and found.sources == digest.sources()
    assert verdicts.path_of(found, "triton").name == "verdict-amd-instinct-test-9-4-triton.json"


# ---- the table and its evidence ------------------------------------------------------------------


def test_the_shipped_table_is_what_the_results_prove():
    """Byte for byte: no row without evidence, none written by hand."""
    table, _ = generator.generate(ROOT / "bench/results", generator.kernel_sources())
    assert dispatch.TABLE.read_text() == generator.dump(table), "run make dispatch"
    assert dispatch.load_table() == table


@pytest.fixture
def entry(tmp_path) -> Path:
    """A published result that proves what `points()` says; its numbers are made up."""
    folder = tmp_path / "cuda-nvidia-test-1"
    folder.mkdir()
    slow = points(lambda *sizes: 2.0, dtype="float16", passes=["training"], dropouts=[False])
    suite = {
        "schema": gpu_suite.SCHEMA, "finished": True, "commit": "abc", "dirty": False,
        "device": {"device_name": GPU.device, "capability": [9, 0], "triton": TRITON},
        "stages": [{"name": name, "status": "passed"} for name in profiles.LIMITS],
    }  # fmt: skip
    (folder / "suite.json").write_text(json.dumps(suite))
    content = records.dump(record([*points(), *slow]))
    (folder / "selfcheck.json").write_text(json.dumps(content))
    return folder


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def stage(name: str, status: str):
    def edit(suite: dict) -> None:
        next(s for s in suite["stages"] if s["name"] == name)["status"] = status

    return edit


def test_good_evidence_gives_rows(entry):
    table, refused = generator.generate(entry.parent, SOURCES)
    assert not refused and len(table["rows"]) == 4 and len(table["slower"]) == 1
    row = table["rows"][0]
    assert row["evidence"] == {"folder": "bench/results/cuda-nvidia-test-1", "commit": "abc"}
    assert row["m"] == [1024, 4096] and len(row["points"]) == 16 and row["backend"] == "cuda"
    assert json.loads(generator.dump(table)) == table
    known = dispatch.evaluate(GPU, table)
    assert known.find(BF16, INSIDE).won and not known.find(torch.float16, INSIDE).won


@pytest.mark.parametrize(
    ("file", "edit", "why"),
    [
        ("suite", stage("tests", "failed"), "stage tests failed"),
        ("suite", stage("tests", "not run"), "stage tests was not run"),
        ("suite", stage("racecheck", "not run"), "stage racecheck was not run"),
        ("suite", stage("memcheck", "timed out"), "memcheck timed out"),
        ("suite", stage("selfcheck", "not run"), "stage selfcheck not run"),
        ("suite", lambda s: s.update(stages=[]), "stage tests was not run"),
        ("suite", lambda s: s.update(finished=False), "cut off"),
        ("suite", lambda s: s.update(dirty=True), "not that of a commit"),
        ("suite", lambda s: s.update(dirty=None), "not that of a commit"),
        ("suite", lambda s: s.update(schema=99), "schema 99"),
        ("suite", lambda s: s["device"].update(device_name="NVIDIA Other"), "the suite on"),
        ("suite", lambda s: s["device"].update(capability=[8, 0]), "the suite on"),
        ("suite", lambda s: s.pop("device"), "KeyError"),
        ("selfcheck", lambda r: r["machine"].update(sources="6" * 64), "not those of this tree"),
        ("selfcheck", lambda r: r["points"][0].update(right=False), "wrong: fused_lora_linear"),
        ("selfcheck", lambda r: r["points"][0].update(ours_ms=-1.0), "ours_ms must be"),
        ("selfcheck", lambda r: r["checks"][0].update(status="wrong"), "wrong: forward"),
        ("selfcheck", lambda r: r.update(backend="cpu"), "of backend 'cpu'"),
    ],
)  # fmt: skip
def test_evidence_that_proves_nothing_gives_no_row(entry, file, edit, why):
    change(entry / f"{file}.json", edit)
    table, refused = generator.generate(entry.parent, SOURCES)
    assert table == EMPTY and any(why in text for text in refused), refused


@pytest.fixture
def both(entry) -> Path:
    """The entry, where Triton's kernels were measured too, by a run of their own."""
    found = record(points(dtype="float32"), machine=OF_TRITON, backend="triton")
    (entry / "selfcheck-triton.json").write_text(json.dumps(records.dump(found)))
    suite = json.loads((entry / "suite.json").read_text())
    suite |= {
        "profile": "triton", "triton_sha256": OF_TRITON.sources, "commit": "def",
        "stages": [{"name": name, "status": "passed"} for name in profiles.TRITON_LIMITS],
    }  # fmt: skip
    (entry / "suite-triton.json").write_text(json.dumps(suite))
    return entry


def test_each_file_gives_rows_of_its_backend(both):
    table, refused = generator.generate(both.parent, SOURCES)
    assert not refused and len(table["rows"]) == 8 and len(table["slower"]) == 1
    assert {(row["backend"], row["dtype"], row["sources"]) for row in table["rows"]} == {
        ("cuda", "bfloat16", SOURCES), ("triton", "float32", OF_TRITON.sources)
    }  # fmt: skip
    of_cuda, of_triton = (
        dispatch.evaluate(here, table, backend=backend)
        for here, backend in ((GPU, "cuda"), (OF_TRITON, "triton"))
    )
    assert of_cuda.find(BF16, INSIDE).won and not of_cuda.steers(torch.float32)
    assert of_triton.find(torch.float32, INSIDE).won and not of_triton.steers(BF16)
    (both / "selfcheck.json").unlink()
    alone, refused = generator.generate(both.parent, SOURCES)
    assert not refused and not alone["slower"]
    assert alone["rows"] == [row for row in table["rows"] if row["backend"] == "triton"]


@pytest.mark.parametrize(
    ("file", "edit", "why"),
    [
        ("suite-triton", stage("triton", "not run"), "stage triton was not run"),
        ("suite-triton", stage("triton", "failed"), "stage triton failed"),
        ("suite-triton", stage("tune-triton", "failed"), "stage tune-triton failed"),
        ("suite-triton", stage("selfcheck-triton", "not run"), "selfcheck-triton not run"),
        ("suite-triton", lambda s: s["stages"].pop(3), "stage selfcheck-triton is missing"),
        ("suite-triton", lambda s: s.update(dirty=None), "not that of a commit"),
        ("suite-triton", lambda s: s.update(profile="cuda"), "stage tests was not run"),
        ("suite-triton", lambda s: s["device"].update(triton="3.8.0"), "not those of this tree"),
        ("suite-triton", lambda s: s["device"].pop("triton"), "KeyError: 'triton'"),
        ("selfcheck-triton", lambda r: r["machine"].update(sources=SOURCES), "not those of this"),
        ("selfcheck-triton", lambda r: r.update(backend="cuda"), "of backend 'cuda'"),
        ("selfcheck-triton", lambda r: r["points"][0].update(right=False), "wrong: fused_lora"),
        ("selfcheck-triton", lambda r: r["machine"].update(device="Other"), "the suite on"),
    ],
)  # fmt: skip
def test_what_refuses_triton_leaves_the_rows_of_cuda(both, file, edit, why):
    change(both / f"{file}.json", edit)
    table, refused = generator.generate(both.parent, SOURCES)
    assert {row["backend"] for row in table["rows"]} == {"cuda"} and len(table["rows"]) == 4
    assert refused and all("cuda-nvidia-test-1/selfcheck-triton.json: " in r for r in refused)
    assert any(why in text for text in refused), refused


def test_a_run_of_triton_alone_gives_its_rows_without_sanitizers(both):
    table, refused = generator.generate(both.parent, SOURCES)
    assert not refused
    commits = {row["backend"]: row["evidence"]["commit"] for row in table["rows"]}
    assert commits == {"cuda": "abc", "triton": "def"}
    change(both / "suite.json", stage("racecheck", "failed"))
    table, refused = generator.generate(both.parent, SOURCES)
    assert {row["backend"] for row in table["rows"]} == {"triton"} and "racecheck" in refused[0]
    for name in ("suite", "selfcheck"):
        (both / f"{name}.json").unlink()
    table, refused = generator.generate(both.parent, SOURCES)
    assert not refused and {row["backend"] for row in table["rows"]} == {"triton"}


def test_what_refuses_cuda_leaves_the_rows_of_triton(both):
    table, refused = generator.generate(both.parent, "6" * 64)
    assert {row["backend"] for row in table["rows"]} == {"triton"}
    assert refused == ["cuda-nvidia-test-1/selfcheck.json: its kernels are not those of this tree"]


def test_a_missing_file_and_a_renamed_folder_give_no_row(entry):
    (entry / "selfcheck.json").rename(entry / "kept.json")
    table, refused = generator.generate(entry.parent, SOURCES)
    assert table == EMPTY and "FileNotFoundError" in refused[0]
    (entry / "kept.json").rename(entry / "selfcheck.json")
    entry.rename(entry.parent / "cuda-nvidia-other")
    table, refused = generator.generate(entry.parent, SOURCES)
    assert table == EMPTY and "the entry is cuda-nvidia-other" in refused[0]


def test_a_slower_point_costs_its_class_alone(entry):
    change(entry / "selfcheck.json", lambda r: r["points"][0].update(ours_ms=2.1))
    table, _ = generator.generate(entry.parent, SOURCES)
    assert len(table["rows"]) == 3 and len(table["slower"]) == 2


def test_the_command_writes_and_checks(entry, tmp_path, monkeypatch, capsys):
    out = tmp_path / "dispatch.json"
    arguments = ["--results", str(entry.parent), "--out", str(out)]
    monkeypatch.setattr(generator, "kernel_sources", lambda: SOURCES)
    monkeypatch.setattr(sys, "argv", ["bench.dispatch", *arguments, "--check"])
    assert generator.main() == 1 and not out.exists()
    monkeypatch.setattr(sys, "argv", ["bench.dispatch", *arguments])
    assert generator.main() == 0 and "4 rows" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench.dispatch", *arguments, "--check"])
    assert generator.main() == 0
    out.write_text(out.read_text().replace("1024", "512", 1))
    assert generator.main() == 1, "edited by hand"

"""The shipped table: the hash that its rows carry, and the evidence that they come from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from dispatch_facts import EMPTY, GPU, INSIDE, SOURCES, points, record
from includes import closure

from lora_kernels import dispatch, machine, records

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import dispatch as generator  # noqa: E402
from bench import gpu_suite  # noqa: E402

BF16 = torch.bfloat16

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
    if gpu_suite.is_current():
        assert machine.sources() == generator.kernel_sources()


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
        "device": {"device_name": GPU.device, "capability": [9, 0]},
        "stages": [{"name": name, "status": "passed"} for name in gpu_suite.LIMITS],
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

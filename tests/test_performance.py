"""docs/performance.md says what bench/results/ holds, and nothing else."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import suite_facts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import goals, performance, publish, report  # noqa: E402


def test_the_page_is_what_the_results_say():
    assert performance.PAGE.read_text() == performance.page(ROOT / "bench/results"), (
        "run make performance"
    )


def test_every_file_it_names_exists():
    text = performance.PAGE.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((performance.PAGE.parent / link).exists() for link in links)


def test_a_device_with_every_result_has_every_section(tmp_path):
    results = tmp_path / "results"
    for make in suite_facts.MAKERS.values():
        folder = publish.publish(make(tmp_path / make.__name__), results)
    text = performance.page(results)
    assert "No GPU has measured" not in text and text.startswith(performance.HEAD)
    for name in set(performance.VIEWS) - {"overhead", "training"}:  # which the suite does not run
        assert f"### {performance.VIEWS[name].title}\n" in text
        assert f"(../bench/results/{folder.name}/{name}.json): commit abc" in text
    for record in publish.RECORDS.values():
        assert f"### {Path(record).stem}\n" in text and "| racecheck | passed |  |" in text
    for picture in (path.name for path in folder.glob("*.png")):
        assert f"(../bench/results/{folder.name}/{picture})" in text
    assert "| 8x8, 8 x 8 x 8, r=4 | 0.909 / 1.000 | 1.000 / 1.100 | 1.010 / 1.111 |" in text


def test_a_stage_is_shown_with_the_state_of_the_gpu(tmp_path):
    gpu = {"lowest": {"sm_mhz": 1755.0, "celsius": 41.0, "watts": None},
           "highest": {"sm_mhz": 1980.0, "celsius": 63.0, "watts": None}}  # fmt: skip
    stages = [
        {"name": "layers", "status": "passed", "summary": {"headline": "fast"}, "gpu": gpu},
        {"name": "tests", "status": "not run", "gpu": {}},
    ]
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"stages": stages, "device": {}, "commit": "abc", "dirty": False}))
    lines = performance.suite(path)
    assert "| layers | passed | fast | 1755 to 1980 | 41 to 63 |  |" in lines
    assert "| tests | not run |  |  |  |  |" in lines


def test_every_table_is_written_with_the_time_it_was_there(tmp_path):
    """Which the series of the GPU's state is compared with."""
    tables, path = [{"rows": []}], tmp_path / "x.json"
    begin = time.time()
    for _ in range(2):
        report.write(path, "x", {}, {}, {"groups": tables})
        tables.append({"rows": []})
    first, second = (table["ended"] for table in json.loads(path.read_text())["groups"])
    assert begin - 0.1 <= first <= second <= time.time() + 0.1


def test_the_sweep_is_shown_by_length_and_the_faster_form_counts(tmp_path):
    publish.publish(suite_facts.make_out(tmp_path / "cuda"), tmp_path / "results")
    folder = publish.publish(suite_facts.make_out_sweep(tmp_path / "out"), tmp_path / "results")
    text = "\n".join(performance.section(folder / "sweep.json", None))
    first, second = text.split("bf16, dropout 0.1, r=64:")
    assert "bf16, dropout 0.1, r=16:" in first
    assert "|  | 8 tokens | 16 tokens |" in first
    assert "| 8x8, 8 x 8 | 1.000 / 1.100 | 1.000 / 1.100 |" in first
    assert "| 8x8, 8 x 8 | 1.010 / 1.111 | 1.040 / 1.144 |" in second


def test_goals_are_met_missed_or_not_measured(tmp_path):
    """By the worst number of each kind, in whatever file it is."""
    results = tmp_path / "results"
    folder = publish.publish(suite_facts.make_out(tmp_path / "cuda"), results)

    def lines() -> dict[str, tuple[str, ...]]:
        found = {goal.about: goal.line(folder)[1:] for goal in goals.GOALS}
        assert len(found) == len(goals.GOALS)
        return found

    low, high = (f"LoRA in the forward GEMM, r {r}" for r in ("<= 32", "= 64"))
    step = "forward and backward over the frozen linear's, K = N = 4096"
    peft = "PEFT's formula over ours, 4096 -> 4096, dropout 0.1"
    addmm = "our kernels over addmm, where chosen by themselves"
    found = lines()
    assert found["our GEMM without LoRA over the vendor's"] == ("1.05", "", "1.100", "**missed**")
    assert found[low] == ("1.02", "", "1.200", "**missed**"), "gemm.json has a slower one"
    assert {found[name][-1] for name in (high, step, peft, addmm)} == {"not measured"}

    (folder / "gemm.json").unlink()
    publish.publish(suite_facts.make_out_sweep(tmp_path / "sweep"), results)
    found = lines()
    assert found[low] == ("1.02", "", "1.000", "met")
    assert found[high] == ("1.03", "", "1.040", "**missed**")
    assert found[step] == ("1.08", "", "0.900", "met")
    assert found[peft] == ("", "1.44", "1.500", "met")
    assert found[addmm] == ("1", "", "0.900", "met")

    rows = [
        {"kernel": "step", "name": "cuda", "over_published": 0.9},
        {"kernel": "step", "name": "eager", "over_published": 2.0},
    ]
    record = {"stages": [{"name": "dram", "summary": {"rows": rows}}, {"name": "layers"}]}
    (folder / "suite.json").write_text(json.dumps(record))
    assert lines()["DRAM bytes of a step over the published"] == ("1", "", "0.900", "met")


def test_bold_is_the_automatic_choice_and_an_error_is_no_number():
    view = performance.VIEWS["layers"]
    shape = {"label": "q", "m": 1, "n": 2, "k": 3, "rank": 4, "dtype": "bf16", "dropout": 0.1}
    rows = [
        {"name": "frozen", "median_ms": 1.0}, {"name": "cuda", "median_ms": 1.25},
        {"name": "triton", "error": "wrong: relative error 1"},
    ]  # fmt: skip
    (group,) = [shape | {"mode": "fwd+bwd", "automatic": "cuda", "rows": rows}]
    lines = performance.tables(view, [group])
    assert lines[1] == "fwd+bwd, bf16, dropout 0.1:"
    assert lines[-1] == "| q, 1 x 2 x 3, r=4 | 1.000 | **1.250** | wrong |"
    assert view.cell({"error": "left out: no compiler"}) == "left out"


def test_the_command_writes_and_checks(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["performance", "--out", str(page), *arguments])
        return performance.main()

    assert run("--check") == 1 and not page.exists()
    assert run() == 0 and run("--check") == 0
    page.write_text(page.read_text().replace("1", "2", 1))
    assert run("--check") == 1 and "stale" in capsys.readouterr().out


def test_numbers_of_a_changed_tree_say_so(tmp_path):
    path = tmp_path / "cpu-x/memory.json"
    path.parent.mkdir()
    machine = {"device_name": "X", "torch": "2", "git_commit": "abc", "git_dirty": True}
    path.write_text(json.dumps({"environment": machine, "groups": []}))
    assert "commit abc with changes that are not in it" in "\n".join(
        performance.section(path, None)
    )
    assert "changes" not in "\n".join(performance.section(path, "abc"))

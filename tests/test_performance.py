"""docs/performance.md says what bench/results/ holds, and nothing else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import suite_facts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import performance, publish  # noqa: E402


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
    for make in (suite_facts.make_out, suite_facts.make_out_triton, suite_facts.make_out_model):
        folder = publish.publish(make(tmp_path / make.__name__), results)
    text = performance.page(results)
    assert "No GPU has measured" not in text and text.startswith(performance.HEAD)
    for name in ("model", "layers", "gemm", "backward", "decode", "group", "kernels"):
        assert f"### {performance.VIEWS[name].title}\n" in text
        assert f"(../bench/results/{folder.name}/{name}.json): commit abc" in text
    for record in ("suite", "suite-triton", "suite-model"):
        assert f"### {record}\n" in text and "| racecheck | passed |  |" in text
    assert "| 8x8, 8 x 8 x 8, r=4 | 0.909 / 1.000 | 1.000 / 1.100 | 1.010 / 1.111 |" in text


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

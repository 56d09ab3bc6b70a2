"""bench_group: what it refuses to time, and what the suite reads and plots of it."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from suite_facts import finished, group_table

from bench import bench_group, evidence, plots
from bench.stages import Failed, NotRun
from lora_kernels import backend, composed

ARGUMENTS = [
    "--tokens", "16", "--rank", "4", "--rounds", "3", "--seconds", "0.01", "--device", "cpu",
    "--backend", "cpu,composed",  # Triton's interpreter serves CPU tensors too, in minutes
]  # fmt: skip


def test_group_means_are_over_frozen_and_over_separate_calls(tmp_path):
    path = tmp_path / "group.json"

    def judge(*tables: dict, code: int = 0) -> dict:
        path.write_text(json.dumps({"groups": tables}))
        return evidence.group(finished(tmp_path, "", code), path)

    found = judge(group_table(0.0), group_table(0.1), group_table(0.0, mode="fwd+bwd"))
    text = "1.100x frozen 0.917x apart"
    assert found["headline"] == f"cuda group forward {text}, cuda group fwd+bwd {text}"
    with pytest.raises(Failed, match="exit code 1"):
        judge(group_table(0.0), code=1)
    with pytest.raises(NotRun, match="no backend"):
        judge(group_table(0.0, rows=[{"name": "frozen", "over_frozen": 1.0}]))


def test_group_json_is_what_the_judge_reads(tmp_path, monkeypatch):
    path = tmp_path / "group.json"
    monkeypatch.setattr(sys, "argv", ["bench_group", *ARGUMENTS, "--json", str(path)])
    assert bench_group.main() == 0
    found = evidence.group(finished(tmp_path, ""), path)
    assert "composed group forward" in found["geometric_means"]
    assert "composed group fwd+bwd" in found["headline"]
    result = json.loads(path.read_text())
    plots.plot_group(tmp_path / "g.png", result["groups"], result["environment"])
    assert (tmp_path / "g.png").stat().st_size > 0


def test_a_wrong_group_is_not_timed(tmp_path, monkeypatch, capsys):
    """Off by one projection's scale, in y or in a gradient alone."""

    def wrong_forward(x, *args):
        ys, hs = composed.group_forward(x, *args)
        return [ys[0] * 2, *ys[1:]], hs

    def wrong_backward(x, *args):
        dx, das, *others = composed.group_backward(x, *args)
        return dx, [das[0] * 2, *das[1:]], *others

    path = tmp_path / "group.json"
    monkeypatch.setattr(sys, "argv", ["bench_group", *ARGUMENTS, "--json", str(path)])
    for field, function, why in (
        ("group_forward", wrong_forward, "y differs"),
        ("group_backward", wrong_backward, "of a gradient"),
    ):
        broken = dataclasses.replace(backend._REGISTRY["composed"], **{field: function})
        with monkeypatch.context() as patch:
            patch.setitem(backend._REGISTRY, "composed", broken)
            backend._changed()
            assert bench_group.main() == 1
        backend._changed()
        rows = json.loads(path.read_text())["groups"][0]["rows"]
        (bad,) = (row for row in rows if row["name"] == "composed group")
        assert why in bad["error"] and "median_ms" not in bad
        assert "FAILED composed group" in capsys.readouterr().out

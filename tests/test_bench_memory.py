"""Bytes saved for backward: what is counted, and what our layer and the others keep."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import bench_memory, contenders, report, shapes

M, N, K, R = 24, 40, 32, 4
SEED = 16  # bytes: int64 [2]


def rows(dtype: str, p: float) -> dict[str, dict]:
    case = shapes.Case(shapes.Shape("", M, N, K), dtype, R)
    problem = contenders.make_problem(case, "cpu")
    return {row["name"]: row for row in bench_memory.measure(problem, p, "cpu")}


def test_each_storage_counts_once_and_known_ones_not_at_all():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def call():
        y = x @ weight  # keeps x and weight
        return (y.exp() * y.exp().t().t()).relu()

    # y.exp() twice, each kept by its exp and by the product, and relu's result
    assert bench_memory.saved_bytes(call, (x, weight)) == 3 * x.nbytes
    assert bench_memory.saved_bytes(call, (x,)) == 3 * x.nbytes + weight.nbytes


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_ours_saves_h_and_the_seed_alone(dtype, size):
    for p in (0.0, 0.1):
        found = rows(dtype, p)
        h = M * R * size
        for name in {"cpu", "composed"} & found.keys():
            assert found[name]["saved_bytes"] == h + (SEED if p else 0)
        assert found["frozen"]["saved_bytes"] == 0
        # the dropped x and torch's mask, which has x's dtype on the CPU
        assert found["eager"]["saved_bytes"] == h + (2 * M * K * size if p else 0)
        assert [row["automatic"] for row in found.values()].count(True) == 1


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_layer_of_peft_saves_what_its_formula_does(p):
    found = rows("bf16", p)
    assert found["lora.Linear"]["saved_bytes"] == found["eager"]["saved_bytes"]
    # its copy of x in fp32, or what dropout makes of that and the mask
    wide = M * R * 4 + M * K * 4 * (2 if p else 1)
    assert found["lora.Linear fp32"]["saved_bytes"] == wide
    assert "lora.Linear fp32" not in rows("fp32", p)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_the_layer_of_peft_computes_the_same_layer():
    case = shapes.Case(shapes.Shape("", M, N, K), "fp32", R)
    problem = contenders.make_problem(case, "cpu")
    exact = contenders.expected(problem, "fwd+bwd")
    for name, layer in bench_memory.layers(problem, 0.0).items():
        if name != "frozen":
            assert contenders.relative_error(layer.call("fwd+bwd", problem.dy)(), exact) < 1e-5


def test_the_record_and_the_cases(tmp_path, monkeypatch):
    out = tmp_path / "memory.json"
    arguments = ["--shape", f"{M},{N},{K}", "--rank", str(R), "--dtype", "fp32,bf16"]
    command = ["memory", *arguments, "--device", "cpu", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_memory.main() == 0
    groups = json.loads(out.read_text())["groups"]
    assert [(g["dtype"], g["dropout"]) for g in groups] == [
        ("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.0), ("bf16", 0.1),
    ]  # fmt: skip
    for group in groups:
        for row in group["rows"]:
            assert ("peak_bytes" in row) == (group["dtype"] == "fp32")
            # at least the three gradients, or the frozen linear's one
            assert row.get("peak_bytes", 1 << 30) >= M * K * 4
    layers = sum(len(model) for model in shapes.MODELS.values())
    assert len(bench_memory.default_cases("cuda", 16)) == layers
    assert len(bench_memory.default_cases("cpu", 16)) > layers


def test_committed_bytes_say_what_the_readme_says_of_ours():
    """Saved for backward: h and the seed, on every layer that was measured."""
    for path in report.RESULTS.glob("*/memory.json"):
        for group in json.loads(path.read_text())["groups"]:
            size = 4 if group["dtype"] == "fp32" else 2
            (ours,) = (row for row in group["rows"] if row["automatic"])
            seed = SEED if group["dropout"] else 0
            assert ours["saved_bytes"] == group["m"] * group["rank"] * size + seed

"""bench_model: a decoder layer under PEFT, what is compared and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import bench_model
from lora_kernels import backend, composed

pytest.importorskip("peft")


@pytest.fixture
def layers(monkeypatch):
    """Contenders of a small layer, of 8 tokens."""
    monkeypatch.setitem(bench_model.MODELS, "small", (32, 48, 4, 2))
    base = bench_model.make_base("small", torch.float32, "cpu")
    x = torch.randn(1, 8, 32, requires_grad=True)

    def made(p: float, backends: list[str]) -> dict[str, bench_model.Layer]:
        return bench_model.layers_of(base, 4, p, torch.float32, backends, x)

    return made


def test_all_share_the_weights_and_compute_the_same(layers):
    found = layers(0.0, ["composed"])
    assert list(found) == ["frozen", "peft", "applied", "composed"]
    weights = [
        {p.data_ptr() for p in layer.module.parameters() if not p.requires_grad}
        for layer in found.values()
    ]
    assert all(one == weights[0] for one in weights)
    assert bench_model.wrong(found["applied"], found["peft"]) is None
    assert len(found["frozen"].step()) == 1 and len(found["peft"].step()) == 1 + 2 * 7


def test_a_layer_that_is_not_fused_is_wrong(layers):
    found = layers(0.0, [])
    assert bench_model.wrong(found["peft"], found["peft"]) == "wrong: 0 of 7 layers are fused"


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_a_wrong_layer_is_not_timed(step, layers, tmp_path, monkeypatch, capsys):
    def wrong(*args):
        found = getattr(composed, step)(*args)
        return (found[0] * 1.5, *found[1:])

    fields = {"forward": composed.forward, "backward": composed.backward} | {step: wrong}
    backend.register(backend.Backend("toy", "a test", **fields))
    path = tmp_path / "model.json"
    arguments = [
        "--model", "small", "--backend", "toy", "--tokens", "8", "--rank", "4", "--dropout", "0.1",
        "--rounds", "3", "--seconds", "0.01", "--device", "cpu", "--json", str(path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench_model", *arguments])
    try:
        assert bench_model.main() == 1
    finally:
        backend.unregister("toy")
    (table,) = json.loads(path.read_text())["groups"]
    rows = {row["name"]: row for row in table["rows"]}
    assert "relative error" in rows["toy"]["error"] and "median_ms" not in rows["toy"]
    assert rows["peft"]["of_peft"] == 1 and rows["applied"]["tokens_per_s"] > 0
    assert rows["applied"]["saved_bytes"] < rows["peft"]["saved_bytes"]
    assert "FAILED toy, 8 tokens p=0.1" in capsys.readouterr().out

"""bench_finetune: that it trains what it says, and refuses what learns otherwise than PEFT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from suite_facts import finished

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import bench_finetune, evidence
from bench.stages import Failed, NotRun
from lora_kernels import backend, composed

pytest.importorskip("peft")
pytest.importorskip("transformers")

SMALL = ((32, 48, 4, 2, 1), (2, 16))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command with a small model: (exit code, its JSON, what it printed)."""
    monkeypatch.setitem(bench_finetune.SCALE, "cpu", SMALL)
    path = tmp_path / "finetune.json"

    def called(*arguments: str) -> tuple[int, dict, str]:
        fixed = ["--device", "cpu", "--steps", "8", "--base-steps", "2", "--json", str(path)]
        monkeypatch.setattr(sys, "argv", ["bench_finetune", *fixed, *arguments])
        code = bench_finetune.main()
        return code, json.loads(path.read_text()), capsys.readouterr().out

    return called


def test_all_learn_what_peft_learns(run, tmp_path):
    code, result, said = run("--backend", "composed", "--dropout", "0,0.1")
    assert code == 0, said
    for table, p in zip(result["groups"], (0, 0.1), strict=True):
        rows = {row["name"]: row for row in table["rows"]}
        assert list(rows) == ["peft", "applied", "composed"] and table["dropout"] == p
        for row in rows.values():
            assert row["last_loss"] < table["first_loss"] and row["samples"] == 3
            assert row["tokens_per_s"] == pytest.approx(32e3 / row["median_ms"])
        if p == 0:  # the same arithmetic: only rounding differs
            peft = rows["peft"]["last_loss"]
            assert rows["applied"]["last_loss"] == pytest.approx(peft, rel=1e-4)
    found = evidence.finetune(finished(tmp_path, ""), tmp_path / "finetune.json")
    assert set(found["geometric_means"]) == {"applied", "composed"}
    assert "x peft, composed" in found["headline"] and "; held-out loss 5." in found["headline"]
    with pytest.raises(Failed, match="exit code 1"):
        evidence.finetune(finished(tmp_path, "", 1), tmp_path / "finetune.json")


def test_a_backend_that_learns_too_little_fails(run):
    def deaf(*args):
        dx, da, db, dbias = composed.backward(*args)
        return dx, torch.zeros_like(da), torch.zeros_like(db), dbias

    fields = {"forward": composed.forward, "backward": deaf}
    backend.register(backend.Backend("deaf", "a test", **fields))
    try:
        code, result, said = run("--backend", "deaf")
    finally:
        backend.unregister("deaf")
    assert code == 1 and "FAILED deaf, fp32 p=0.1: wrong: it learnt 0.0000" in said
    assert [row["name"] for row in result["groups"][0]["rows"] if "error" in row] == ["deaf"]


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (1.01, 1.0, None), (0.99, 1.0, None), (1.06, 1.0, "it learnt 0.9400, peft 1.0000"),
        (0.94, 1.0, "within 5%"), (2.5, 2.5, "peft learnt nothing"), (float("nan"), 1.0, "learnt"),
    ],
)  # fmt: skip
def test_what_counts_as_learning_the_same(ours, theirs, why):
    said = bench_finetune.wrong({"last_loss": ours}, {"last_loss": theirs}, 2.0)
    assert said is None if why is None else why in said


def test_a_layer_that_is_not_fused_is_wrong(run, monkeypatch):
    monkeypatch.setattr(bench_finetune.lk, "apply", lambda model: model)
    code, _, said = run()
    assert code == 1 and "wrong: 0 of 7 layers are fused" in said


def test_turns_and_texts():
    turns = []

    class Learner:
        def __init__(self, name):
            self.timed_step = lambda batch: turns.append((name, batch))

    learners = {name: Learner(name) for name in "abc"}
    assert bench_finetune.train(learners, 3, iter("xyz?")) == "z"
    assert "".join(name for name, _ in turns) == "abcbcacab"
    assert "".join(batch for _, batch in turns) == "xxxyyyzzz"
    for text, word in zip(bench_finetune.texts(), (b"import ", b"statement"), strict=True):
        for part in text:
            assert word in bytes(part.tolist()[:200_000])
        assert len(text.held_out) == pytest.approx(len(text.seen) / 9, rel=1e-3)
    first, again, other = (
        next(bench_finetune.batches(text.seen, (2, 16), seed, "cpu")) for seed in (1, 1, 2)
    )
    assert first.shape == (2, 17) and torch.equal(first, again) and not torch.equal(first, other)


def test_too_few_steps_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--steps", "6")
    assert "expected 7 or more" in capsys.readouterr().err


def test_nothing_but_peft_is_not_run(tmp_path):
    path = tmp_path / "finetune.json"
    path.write_text(json.dumps({"groups": [{"rows": [{"name": "peft", "of_peft": 1.0}]}]}))
    with pytest.raises(NotRun, match="nothing was trained"):
        evidence.finetune(finished(tmp_path, ""), path)

"""Criterion C7: training by every backend beside eager PyTorch, short here and whole if slow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tolerance
import torch
from conftest import USABLE

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import composed

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import report, tiny_lm, training

TINY = tiny_lm.Sizes(layers=1, width=32, heads=2, hidden=48, vocabulary=24, batch=4, length=24)
STEPS, EPSILON = 12, 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EAGER: dict = {}  # by (device, dtype): the same for every backend


def trained(linear, dtype: torch.dtype, device: str = "cpu") -> list[training.Trained]:
    return [training.train(linear, dtype, seed, STEPS, device, TINY, EPSILON) for seed in range(2)]


def violations(name: str, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """What breaks C7 in a few steps of a tiny model by backend `name`."""
    key = device, dtype
    if key not in _EAGER:
        _EAGER[key] = trained(training.eager(), dtype, device)
    found = training.compare(trained(training.ours(name), dtype, device), _EAGER[key])
    return tolerance.c7_violations(dtype, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backend_trains_as_eager_does(backend, dtype):
    assert violations(backend, DTYPES[dtype]) == []


# ---- wrong gradients -----------------------------------------------------------------------------

X, SEED, SCALE = 1, 6, 9  # places among the arguments of a backend's backward


def undropped_in_da(*args):
    dx, _, *rest = composed.backward(*args)
    plain = list(args)
    plain[SEED] = None
    return dx, composed.backward(*plain)[1], *rest


def unmasked_dx(*args):
    # With B this close to zero, less than what bf16 rounds away.
    plain = list(args)
    plain[SEED] = None
    return composed.backward(*plain)[0], *composed.backward(*args)[1:]


def other_mask(*args):
    other = list(args)
    other[SEED] = args[SEED] + 1
    return composed.backward(*other)


def half_da(*args):
    dx, da, *rest = composed.backward(*args)
    return dx, da / 2, *rest


def no_lora_in_dx(dy, x, weight, *rest):
    return (dy @ weight).view_as(x), *composed.backward(dy, x, weight, *rest)[1:]


def last_token_lost_in_db(*args):
    first = [args[0].clone(), *args[1:]]
    first[0].view(-1, first[0].shape[-1])[-1] = 0
    dx, da, _, dbias = composed.backward(*args)
    return dx, da, composed.backward(*first)[2], dbias


WRONG = (undropped_in_da, unmasked_dx, other_mask, half_da, no_lora_in_dx, last_token_lost_in_db)


@pytest.fixture
def register():
    """Registers a backend `trial` with a given backward pass."""

    def add(backward) -> None:
        backends.register(lk.Backend("trial", "a test", composed.forward, backward))

    yield add
    backends.unregister("trial")


@pytest.mark.parametrize("backward", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_gradient_is_caught(register, backward):
    register(composed.backward)
    assert violations("trial", torch.float32) == [], "the same, but right"
    register(backward)
    assert violations("trial", torch.float32)
    assert violations("trial", torch.bfloat16) or backward is unmasked_dx


def test_every_part_of_the_criterion_can_fail():
    right = dict(loss_difference=0.0, eager_spread=1.0, cosine=1.0, gradient_difference=0.0)
    right["idle"] = []
    assert tolerance.c7_violations(torch.bfloat16, right) == []
    nan = float("nan")
    for wrong in (
        {"loss_difference": 0.02}, {"loss_difference": nan}, {"eager_spread": -1.0},
        {"cosine": 0.99}, {"cosine": nan}, {"gradient_difference": 0.5}, {"idle": ["a"]},
    ):  # fmt: skip
        assert len(tolerance.c7_violations(torch.bfloat16, right | wrong)) >= 1, wrong


# ---- the command ---------------------------------------------------------------------------------


def command(tmp_path, monkeypatch, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "training.json"
    plot = ["--json", str(out), "--plot", str(tmp_path / "training.png"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training", *plot, *arguments])
    code = training.main()
    assert (tmp_path / "training.png").stat().st_size > 0
    return code, json.loads(out.read_text())


def test_the_record_names_the_backend_that_fails(tmp_path, monkeypatch, register, capsys):
    register(other_mask)
    monkeypatch.setattr(training, "SIZES", TINY)
    few = ("--steps", str(STEPS), "--dtype", "fp32", "--backend", "composed,trial")
    code, result = command(tmp_path, monkeypatch, *few)
    assert code == 1 and "FAILED trial, fp32" in capsys.readouterr().out
    (group,) = result["groups"]
    assert [row["name"] for row in group["rows"]] == ["eager", "trial", "composed"]
    assert [("error" in row) for row in group["rows"]] == [False, True, False]
    assert all(len(losses) == STEPS for row in group["rows"] for losses in row["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_200_steps(tmp_path, monkeypatch, dtype):
    # Triton's interpreter would take hours; it trains a few steps above.
    names = ",".join(name for name in USABLE if name != "triton")
    code, result = command(tmp_path, monkeypatch, "--dtype", dtype, "--backend", names)
    assert code == 0, result["failures"]
    (group,) = result["groups"]
    assert {row["name"] for row in group["rows"]} >= {"eager", "composed", "reference"}
    assert all(row["last_loss"] < row["first_loss"] / 2 for row in group["rows"])


def test_committed_curves_hold_the_criterion():
    """A limit that is tightened must not leave a record behind that breaks it."""
    for path in report.RESULTS.glob("*/training.json"):
        result = json.loads(path.read_text())
        assert result["settings"]["steps"] == tolerance.TRAINING_STEPS
        for group in result["groups"]:
            for row in group["rows"]:
                assert tolerance.c7_violations(DTYPES[group["dtype"]], row) == []


@pytest.mark.gpu
def test_the_cuda_backend_trains_as_eager_does():
    missing = lk.backends()["cuda"]
    if missing is not None:
        pytest.skip(missing)
    assert violations("cuda", torch.bfloat16, "cuda") == []

"""Half a minute of either half of fuzz.py, always the same calls, and every call it ever failed."""

from __future__ import annotations

import itertools
import os
import signal
import types

import fuzz
import fuzz_arguments
import fuzz_cases
import fuzz_values
import hypothesis.strategies as st
import pytest
import torch

import lora_kernels as lk

CALLS = {"values": 2000, "arguments": 3000}  # some half a minute each


@pytest.mark.parametrize("what", fuzz.HALVES)
def test_random_calls_are_right_or_refused(what, capsys):
    code = fuzz.main(["--what", what, "--seed", "0", "--calls", str(CALLS[what])])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "calls are right" in said


@pytest.mark.parametrize("case", fuzz_cases.VALUES, ids=lambda case: case.call)
def test_values_that_failed_once(case):
    fuzz_values.check(case)


@pytest.mark.parametrize("call", fuzz_cases.ARGUMENTS, ids=lambda call: call.function)
def test_arguments_that_failed_once(call):
    fuzz_arguments.check(call)


@pytest.mark.slow
def test_a_failure_is_made_small_and_printed_as_a_case(capsys, monkeypatch, tmp_path):
    """A bug that only a width of 7 or more shows."""
    right = lk.fused_lora_linear

    def wrong(x, *args, **kwargs):
        return right(x, *args, **kwargs) + (x.shape[-1] >= 7)

    monkeypatch.setattr(lk, "fused_lora_linear", wrong)
    assert fuzz.half("values", 60, 0, ("composed",), tmp_path / "last") == 1
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.strip().startswith("Case("))
    (small,) = eval(line, vars(fuzz_values))
    assert small.k == 7 and small.call == "op" and small.sizes in (((1, 1),), ((1, 0),))
    with pytest.raises(AssertionError):
        fuzz_values.check(small)


def test_a_crash_names_the_call_that_it_died_of(capsys, monkeypatch):
    monkeypatch.setattr(fuzz_values, "check", lambda case: os.kill(os.getpid(), signal.SIGKILL))
    assert fuzz.main(["--what", "values", "--seconds", "60", "--seed", "0"]) == signal.SIGKILL
    assert "died of SIGKILL, seed 0:\n    Case(" in capsys.readouterr().out


def test_a_search_stops_at_its_time_and_repeats_itself(monkeypatch):
    """By a clock that one look advances by a second."""
    made: list[list[int]] = [[], []]
    for calls, seconds in zip(made, (150, 250), strict=True):
        clock = types.SimpleNamespace(monotonic=itertools.count().__next__)
        monkeypatch.setattr(fuzz, "time", clock)
        fuzz.search(st.integers(), calls.append, seconds, 3, lambda case: None)
    fewer, more = made
    assert 100 < len(fewer) < 150 < len(more) < 250 and more[: len(fewer)] == fewer


@pytest.mark.parametrize("y", ["wrong", "wrong_dtype", "shared"])
def test_the_judge_of_values_sees_a_flaw(monkeypatch, y):
    right = lk.fused_lora_linear

    def wrong(x, *args, **kwargs):
        found = right(x, *args, **kwargs)
        if y == "shared":
            x.detach().add_(1)
        return {"wrong": found * (1 + 2**-12), "wrong_dtype": found.double()}.get(y, found)

    monkeypatch.setattr(lk, "fused_lora_linear", wrong)
    with pytest.raises(AssertionError):
        fuzz_values.check(fuzz_values.Case(k=64, lead=(32,), sizes=((48, 8),), mode="no_grad"))


def test_the_judge_of_arguments_sees_a_flaw(monkeypatch):
    good = fuzz_arguments.Call("lk.fused_lora_linear", tuple(fuzz_cases._call(
        fuzz_cases._X, fuzz_cases._W, fuzz_cases._A, fuzz_cases._B).args))  # fmt: skip
    fuzz_arguments.check(good)

    def of(result):
        def stand_in(
            x, weight, lora_a, lora_b, bias=None, *, scaling=1.0, dropout_p=0.0, seed=None
        ):
            return result(x)

        return stand_in

    def keyed(x):
        return {}[x]

    for result in (lambda x: torch.zeros(5, 6), lambda x: torch.zeros(6), keyed):
        monkeypatch.setattr(lk, "fused_lora_linear", of(result))
        with pytest.raises((AssertionError, KeyError)):
            fuzz_arguments.check(good)

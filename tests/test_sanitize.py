"""What compute-sanitizer runs: every layout of every op, checked, and wrong results told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_gpu_suite import CLEAN, ROOT, finished

from bench import evidence, sanitize
from lora_kernels import composed


def test_sanitized_calls_are_right_on_the_cpu():
    done = subprocess.run(
        [sys.executable, "-m", "bench.sanitize", "--device", "cpu"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 77:  # the C++ kernels may not be built
        assert done.returncode == 0 and ": 0 wrong" in done.stdout, done.stdout + done.stderr


def test_forward_as_is_called_in_every_form_on_every_layout():
    calls = [call.args for call in sanitize.calls("forward_as")]
    assert {args[0].dtype for args in calls} == {torch.bfloat16, torch.float16}
    for form in sanitize.FORMS:
        mine = [args for args in calls if args[-3] == form]
        for x_offset, w_contiguous in ((0, True), (0, False), (1, True)):
            some = [
                a for a in mine
                if a[0].storage_offset() == x_offset and a[1].is_contiguous() == w_contiguous
            ]  # fmt: skip
            assert {a[5] is None for a in some} == {True, False}, "with and without dropout"
            assert {a[2].shape[0] for a in some} >= {1, 3, 16, 24, 65, 128}
        assert {a[4] is None for a in mine} == {True, False}, "with and without bias"
    plain = [args for args in calls if args[-3] == ""]
    assert plain and all(a[2].shape[0] == 0 and a[3].shape[1] == 0 for a in plain)


def test_operands_reach_the_device_as_they_lie():
    x = sanitize._misaligned(torch.arange(24.0).view(4, 6))
    for t in (
        x,
        torch.rand(3, 4).t(),
        torch.rand(5),
        torch.rand(4, 6)[:0],
        torch.rand(4, 6)[:, :0],
    ):
        moved = sanitize._moved(t, "cpu")
        assert torch.equal(moved, t) and moved.stride() == t.stride()
        assert moved.storage_offset() == t.storage_offset()
    moved = sanitize._moved(x, "meta")
    assert moved.stride() == (7, 1) and moved.storage_offset() == 1


def sanitized(monkeypatch, forward_as, forward_plan=lambda *args: "a plan") -> int:
    ops = torch.ops.lora_kernels
    monkeypatch.setattr(ops, "forward_as", forward_as, raising=False)
    monkeypatch.setattr(ops, "forward_plan", forward_plan, raising=False)
    monkeypatch.setattr(sanitize.schemas, "runs_here", lambda op, device: op == "forward_as")
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu"])
    return sanitize.main()


def test_sanitized_forward_as_is_checked(monkeypatch, capsys, tmp_path):
    def right(*args):
        return composed.forward(*args[:-3])

    def refuses_misaligned(x, *args):
        if x.storage_offset():
            raise RuntimeError("forward_plan: x is misaligned")
        return "a plan"

    total = sum(1 for _ in sanitize.calls("forward_as"))
    misaligned = sum(call.args[0].storage_offset() for call in sanitize.calls("forward_as"))
    assert sanitized(monkeypatch, right) == 0
    assert f"checked {total} calls of forward_as: 0 wrong" in capsys.readouterr().out
    assert sanitized(monkeypatch, right, refuses_misaligned) == 0
    done = finished(tmp_path, capsys.readouterr().out + CLEAN)
    found = evidence.sanitizer(done, "memcheck")
    assert (found["calls"], found["refused"]) == (total - misaligned, misaligned)


def ignores_bias(x, weight, a, b, bias, *more):
    return composed.forward(x, weight, a, b, None, *more[:-3])


def loses_the_last_rank(x, weight, a, b, *more):
    _, h = composed.forward(x, weight, a, b, *more[:-3])
    return composed.fused_gemm(x, weight, h[:, :-1], b[:, :-1], more[0], None, 0, more[4]), h


def reads_a_dense_x(x, *more):
    return composed.forward(x.as_strided(x.shape, (x.shape[1], 1)), *more[:-3])


@pytest.mark.parametrize("forward_as", [ignores_bias, loses_the_last_rank, reads_a_dense_x])
def test_sanitized_forward_as_tells_wrong_results(monkeypatch, capsys, forward_as):
    assert sanitized(monkeypatch, forward_as) == 1
    assert "WRONG forward_as(" in capsys.readouterr().out

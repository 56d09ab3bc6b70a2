"""What compute-sanitizer runs: every layout of every op, checked, and wrong results told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from suite_facts import finished
from test_evidence import CLEAN, ROOT

from bench import evidence, sanitize
from bench.stages import Failed
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
    decode = [args for args in calls if args[-3] == "decode"]
    assert {a[5] is None for a in decode} == {True, False}, "with and without dropout"
    assert {a[0].storage_offset() for a in decode} == {0, 1}
    assert {a[0].shape[0] for a in decode} >= {1, 17, 40}
    plain = [args for args in calls if args[-3] == ""]
    assert plain and all(a[2].shape[0] == 0 and a[3].shape[1] == 0 for a in plain)


def test_backward_as_is_called_in_both_forms_on_every_layout():
    calls = [call.args for call in sanitize.calls("backward_as")]
    assert {args[1].dtype for args in calls} == {torch.bfloat16, torch.float16}
    needs = {form: {a[12:16] for a in calls if a[-3] == form} for form in sanitize.BACKWARD_FORMS}
    assert needs["one_grid"] == {(True, True, True, False)}
    assert all({n[i] for n in needs["passes"]} == {True, False} for i in range(4))
    for form in sanitize.BACKWARD_FORMS:
        mine = [args for args in calls if args[-3] == form]
        for offset in (0, 1):
            some = [a for a in mine if all(t.storage_offset() == offset for t in a[:6])]
            assert {a[6] is None for a in some} == {True, False}, "with and without dropout"
            assert {a[3].shape[0] for a in some} >= {1, 3, 16, 24, 40, 65}
        assert {args[10] for args in mine} == {args[11] for args in mine} == {True, False}
    assert any(not a[2].is_contiguous() and not a[2].storage_offset() for a in calls)
    in_one = [args[1].shape for args in calls if args[-3] == "one_grid"]
    assert any(m > 512 and k > 512 for m, k in in_one), "chunks and slices of more than one"


def test_the_mask_on_the_lora_term_is_called_on_both_orders_of_the_weight():
    masked = [call.args for call in sanitize.calls("fused_gemm") if call.args[5] is not None]
    assert {args[1].is_contiguous() for args in masked if args[1].shape[0] > 8} == {True, False}
    grads = [call.args for call in sanitize.calls("weight_grad")]
    assert {(a[5], a[6]) for a in grads} == {(w, t) for w in (True, False) for t in (True, False)}
    assert {a[2] is None for a in grads if not a[6]} == {True, False}


def test_groups_are_called_on_both_layouts_with_masks_of_their_own():
    for op in sanitize.GROUPS:
        found = [call.args for call in sanitize.calls(op)]
        for offset in (0, 1):
            seeds = [a[5 if op == "forward_group" else 6] for a in found
                     if a[0].storage_offset() == offset]  # fmt: skip
            assert {s[0] is None for s in seeds} == {True, False}
            assert all(not torch.equal(s[0], s[1]) for s in seeds if s[0] is not None)
    assert {a[12] for a in found} == {True, False}, "dx or not"
    assert all({a[i][0] for a in found} == {True, False} for i in (13, 14))


def test_operands_reach_the_device_as_they_lie():
    x = sanitize._misaligned(torch.arange(24.0).view(4, 6))
    for t in (
        x,
        torch.rand(3, 4).t(),
        torch.rand(5),
        torch.rand(4, 6)[:0],
        torch.rand(4, 6)[:, :0],
    ):
        moved = sanitize.moved(t, "cpu")
        assert torch.equal(moved, t) and moved.stride() == t.stride()
        assert moved.storage_offset() == t.storage_offset()
    moved = sanitize.moved(x, "meta")
    assert moved.stride() == (7, 1) and moved.storage_offset() == 1


def test_operators_take_turns_and_none_is_left_out():
    ops = ("dropout_mask", "weight_grad", "forward_as")
    found = sanitize.turns(ops)
    counts = {op: sum(1 for _ in sanitize.calls(op)) for op in ops}
    assert {op: sum(call.op == op for call in found) for op in ops} == counts
    kinds = list(dict.fromkeys(map(sanitize.kind, found)))
    assert [sanitize.kind(call) for call in found[: len(kinds)]] == kinds, "each once, first"
    assert {k.split(" ")[0] for k in kinds} == set(ops)
    assert {f"forward_as {form}" for form in (*sanitize.FORMS, "decode", "plain")} < set(kinds)
    first = [call.args for call in found[:60] if call.op == "forward_as"]
    assert len({args[0].shape for args in first}) > 2, "not one shape after another"
    assert {args[0].dtype for args in first} == {torch.bfloat16, torch.float16}
    assert {args[5] is None for args in first} == {True, False}


FORMS = ", ".join(dict.fromkeys(map(sanitize.kind, sanitize.turns(["forward_as"]))))


def sanitized(
    monkeypatch, kernel, plan=lambda *args: "a plan", op: str = "forward_as", arguments=()
) -> int:
    ops = torch.ops.lora_kernels
    monkeypatch.setattr(ops, op, kernel, raising=False)
    monkeypatch.setattr(ops, op.replace("_as", "_plan"), plan, raising=False)
    monkeypatch.setattr(sanitize.schemas, "runs_here", lambda name, device: name == op)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", *arguments])
    return sanitize.main()


def test_the_end_of_the_time_is_told(monkeypatch, capsys, tmp_path):
    def right(*args):
        return composed.forward(*args[:-3])

    left = iter([100.0] * 5 + [1.0])
    monkeypatch.setattr(sanitize.stages, "seconds_left", lambda: next(left))
    total = sum(1 for _ in sanitize.calls("forward_as"))
    assert sanitized(monkeypatch, right) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f"no time for {total - 5} calls", f"checked 5 calls of {FORMS}: 0 wrong"]
    left = iter([100.0] * 2 + [1.0])
    assert sanitized(monkeypatch, right) == 0
    said = capsys.readouterr().out
    assert f"no call of {', '.join(FORMS.split(', ')[2:])} was made" in said.splitlines()
    with pytest.raises(Failed, match=f"no time for any call of {FORMS.split(', ')[2]}"):
        evidence.sanitizer(finished(tmp_path, said + CLEAN), "memcheck")


def test_run_only_compares_nothing_and_does_not_say_it_did(monkeypatch, capsys):
    runs = []

    def wrong(*args):
        runs.append(args)
        return tuple(t + 1 for t in composed.forward(*args[:-3]))

    assert sanitized(monkeypatch, wrong, arguments=("--run-only",)) == 0
    total = sum(1 for _ in sanitize.calls("forward_as"))
    assert f"ran {total} calls of {FORMS}: 0 wrong" in capsys.readouterr().out
    assert len(runs) == 2 * total
    assert sanitized(monkeypatch, wrong) == 1


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
    assert f"checked {total} calls of {FORMS}: 0 wrong" in capsys.readouterr().out
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


def test_sanitized_backward_as_is_checked(monkeypatch, capsys, tmp_path):
    def right(*args):
        return composed.backward(*args[:-3])

    def plan(x, weight, a, b, seed, form, tile_n, group):
        if form == "one_grid" and a.shape[0] > 64:
            raise RuntimeError("backward: not served: r is more than 64")
        return "a plan"

    assert sanitized(monkeypatch, right, plan, "backward_as") == 0
    found = evidence.sanitizer(finished(tmp_path, capsys.readouterr().out + CLEAN), "memcheck")
    calls = list(sanitize.calls("backward_as"))
    refused = sum(c.args[-3] == "one_grid" and c.args[3].shape[0] > 64 for c in calls)
    assert found["refused"] == refused > 0 and found["calls"] == len(calls) - refused


def forgets_the_mask(*args):
    return composed.backward(*args[:6], None, 0, *args[8:-3])


def adds_no_bias(*args):
    *grads, dbias = composed.backward(*args[:-3])
    return *grads, dbias * 0


def swaps_scales(*args):
    return composed.backward(*args[:8], args[9], args[8], *args[10:-3])


def loses_the_last_rows(dy, x, weight, a, b, h, *more):
    dx = composed.backward(dy, x, weight, a, b, h, *more[:-3])[0]
    first = slice(512)
    return dx, *composed.backward(dy[first], x[first], weight, a, b, h[first], *more[:-3])[1:]


def makes_unwanted(*args):
    return composed.backward(*args[:12], True, *args[13:-3])


@pytest.mark.parametrize(
    "backward_as",
    [forgets_the_mask, adds_no_bias, swaps_scales, loses_the_last_rows, makes_unwanted],
)
def test_sanitized_backward_as_tells_wrong_results(monkeypatch, capsys, backward_as):
    monkeypatch.setattr(sanitize, "DTYPES", sanitize.DTYPES[:1])
    assert sanitized(monkeypatch, backward_as, op="backward_as") == 1
    assert "WRONG backward_as(" in capsys.readouterr().out

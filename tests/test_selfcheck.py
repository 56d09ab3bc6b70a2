"""`python -m lora_kernels selfcheck`: what it checks, times, stores and says, on the CPU."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dispatch_facts import WRONG, points, record

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import (
    composed,
    dispatch,
    machine,
    op_checks,
    records,
    selfcheck,
    selfcheck_cli,
    shape_classes,
    verdicts,
)
from lora_kernels.schemas import has_kernel
from lora_kernels.selfcheck import SHAPES, CannotRun

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import evidence, profiles  # noqa: E402
from bench.stages import Failed, Finished, NotRun  # noqa: E402

CPU = torch.device("cpu")
SHAPE = (16, 24, 32, 4)
BUILT = pytest.mark.skipif(not has_kernel("forward", "CPU"), reason="no C++ library")


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """One small problem an operator, few samples, and a cache of its own."""
    monkeypatch.setenv(verdicts.ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_warned", set())
    monkeypatch.setattr(op_checks, "SHAPES", ((17, 24, 40, 3),))
    monkeypatch.setattr(selfcheck, "ROUNDS", 3)


def run(*arguments: str) -> int:
    return selfcheck_cli.main(["--device", "cpu", "--shapes", "16x24x32x4", *arguments])


# ---- the operators -------------------------------------------------------------------------------


@BUILT
def test_every_operator_is_checked_with_dropout_and_without():
    found = list(op_checks.run("cpu", CPU, [torch.float32, torch.bfloat16]))
    assert len(found) == op_checks.count([torch.float32, torch.bfloat16])
    right = {(c.op, c.dtype, c.dropout) for c in found if c.status == records.RIGHT}
    ops = ("down_proj", "fused_gemm", "weight_grad", "forward", "backward", "forward_group")
    for op in (*ops, "backward_group", op_checks.WHOLE):
        for dtype in ("float32", "bfloat16"):
            assert {(op, dtype, False), (op, dtype, True)} <= right
    forms = {c.form for c in found if c.status == records.NOT_SERVED}
    assert forms == {*op_checks.FORWARD_FORMS, *op_checks.BACKWARD_FORMS}
    assert not [c for c in found if c.status == records.WRONG]
    assert all(0 <= c.usage <= 1 for c in found if c.status == records.RIGHT)


def test_every_operator_of_the_schemas_is_checked():
    """A new kernel must not be forgotten here."""
    names = {op for op, _ in op_checks.CALLS} | set(op_checks.GROUPS)
    computing = {
        s.split("(")[0] for s in lk.schemas.SCHEMAS if "->" in s and "Tensor x" in s.split("->")[0]
    }
    plans = {name for name in computing if name.endswith("_plan")}
    whole = {name for name in computing if name.startswith("lora_linear")}
    triton = {"forward_triton", "backward_triton"}  # what the whole op is on backend triton
    assert computing - plans - whole - triton == names


def off_by(step: float, place: int):
    """An operator whose result `place` is wrong in one element."""

    def spoil(results):
        many = isinstance(results, (tuple, list))
        changed = list(results) if many else [results]
        target = changed[place][0] if isinstance(changed[place], list) else changed[place]
        target.view(-1)[-1] += step
        return tuple(changed) if many else changed[0]

    return spoil


@BUILT
@pytest.mark.parametrize(
    ("op", "place"),
    [("down_proj", 0), ("fused_gemm", 0), ("weight_grad", 0), ("forward", 0), ("forward", 1)]
    + [("backward", place) for place in range(4)]
    + [("forward_group", 0), ("forward_group", 1)]
    + [("backward_group", place) for place in range(4)],
)
@pytest.mark.parametrize("step", [1.0, float("nan")])
def test_a_wrong_element_of_any_result_is_found(monkeypatch, op, place, step):
    ops = torch.ops.lora_kernels
    real = getattr(ops, op)
    spoil = off_by(step, place)
    monkeypatch.setattr(ops, op, lambda *args: spoil(real(*args)))
    found = list(op_checks.run("composed", CPU, [torch.float32]))
    wrong = {c.op for c in found if c.status == records.WRONG}
    assert wrong == {op}
    assert all("past the bound" in c.note for c in found if c.status == records.WRONG)


@BUILT
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("forward: not served: r is more than 128; take form='two_launches'", records.NOT_SERVED),
        ("forward_as: form is 'decode'; expected one_launch", records.NOT_SERVED),
        ("fused_gemm: why; take lora_kernels.composed.fused_gemm", records.NOT_SERVED),
        ("forward [1, 2]: an illegal memory access was encountered", records.WRONG),
    ],
)
def test_a_refusal_is_no_fault_and_a_fault_no_refusal(monkeypatch, text, status):
    def refuse(*args):
        raise RuntimeError(f"{text}\nmore")

    monkeypatch.setattr(torch.ops.lora_kernels, "forward", refuse)
    found = [c for c in op_checks.run("composed", CPU, [torch.float32]) if c.op == "forward"]
    assert {c.status for c in found} == {status} and all(text in c.note for c in found)


# ---- what is checked -----------------------------------------------------------------------------


def test_what_is_checked_by_default():
    gpu = torch.device("cuda")
    assert selfcheck.default_dtypes(gpu) == (torch.bfloat16, torch.float16)
    of_triton = selfcheck.default_dtypes(gpu, "triton")
    assert of_triton == (torch.bfloat16, torch.float16, torch.float32)
    for name in (None, "cpu", "triton"):
        assert selfcheck.default_dtypes(CPU, name) == (torch.float32,)
    assert selfcheck.default_shapes(gpu) == SHAPES["default"]
    assert selfcheck.default_shapes(CPU) == SHAPES["small"]


# ---- the verdict ---------------------------------------------------------------------------------


@BUILT
def test_a_cpu_is_checked_timed_and_its_verdict_stored():
    steps = []
    found = selfcheck.selfcheck(
        "cpu", shapes=[SHAPE], progress=lambda done, total, what: steps.append((done, total))
    )
    assert found.wrong() == [] and found.backend == "cpu"
    kinds = {(p.of_pass, p.dropout) for p in found.points}
    assert kinds == {(name, d) for name in shape_classes.PASSES for d in (False, True)}
    assert all(p.ours_ms > 0 and p.composed_ms > 0 and p.right for p in found.points)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]
    assert verdicts.load(machine.of(CPU)) == (found, "")


@BUILT
def test_a_verdict_of_a_cpu_steers_nothing():
    x = torch.randn(16, 32)
    before = lk.explain(x, x, x, x[:, :16]).backend
    selfcheck.selfcheck("cpu", shapes=[SHAPE])
    assert lk.explain(x, x, x, x[:, :16]).backend == before


@pytest.fixture
def planted(monkeypatch):
    """Backend `cpu` with a gradient that is wrong."""

    def backward(*args):
        dx, da, db, dbias = composed.backward(*args)
        return dx, da * 1.01, db, dbias

    monkeypatch.setitem(
        backends._REGISTRY, "cpu", lk.Backend("cpu", "", composed.forward, backward)
    )
    dispatch.reload()
    yield
    monkeypatch.undo()
    dispatch.reload()


def test_a_wrong_backend_is_found_at_the_points_too(planted):
    found = selfcheck.selfcheck("cpu", shapes=[SHAPE], operators=False, keep=False)
    assert not any(p.right for p in found.points) and found.wrong() == ["fused_lora_linear"]


def test_a_wrong_kernel_makes_the_exit_code_and_the_verdict(planted, capsys):
    assert run("--no-operators") == selfcheck_cli.KERNEL_WRONG
    assert "WRONG RESULTS: fused_lora_linear" in capsys.readouterr().out
    assert verdicts.load(machine.of(CPU))[0].wrong()


def test_a_point_that_faults_is_wrong_and_one_without_memory_is_not(monkeypatch):
    def fault(*args):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(selfcheck, "_right", fault)
    found = selfcheck.selfcheck("cpu", shapes=[SHAPE], operators=False, keep=False)
    assert found.wrong() == ["fused_lora_linear"] and found.points == ()

    def too_much(*args):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(selfcheck, "_right", too_much)
    found = selfcheck.selfcheck("cpu", shapes=[SHAPE], operators=False, keep=False)
    assert found.wrong() == [] and "does not fit" in found.checks[0].note


def test_time_that_runs_out_leaves_points_out(monkeypatch):
    found = selfcheck.selfcheck("cpu", shapes=[SHAPE], operators=False, keep=False, seconds=-1)
    assert found.points == ()


def test_sampled_rows_are_those_of_the_oracle():
    problem = op_checks.make((200, 24, 32, 4), torch.float32, 0.3, CPU)
    rows = torch.tensor([0, 63, 199])
    exact, whole = lk.criterion.oracle(problem, rows), lk.criterion.oracle(problem)
    for kind in ("value", "total", "middle", "partial"):
        for name in ("y", "x"):
            torch.testing.assert_close(getattr(exact, kind)[name], getattr(whole, kind)[name][rows])
        assert torch.equal(getattr(exact, kind)["lora_a"], getattr(whole, kind)["lora_a"])
    assert selfcheck._right(problem, "reference", CPU)


@pytest.mark.parametrize(
    ("device", "dtypes", "why"),
    [
        ("meta", [torch.float32], "expected a CPU or a CUDA device"),
        ("cpu", [torch.float64], "no torch.float64 kernels"),
    ],
)
def test_what_cannot_be_checked_says_why(device, dtypes, why):
    with pytest.raises(CannotRun, match=why):
        selfcheck.selfcheck(device, dtypes=dtypes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert selfcheck_cli.main([]) == selfcheck_cli.NO_RUN
    out = capsys.readouterr().out
    assert "torch sees no CUDA device" in out and "--device cpu" in out


# ---- the command ---------------------------------------------------------------------------------


@BUILT
@pytest.mark.parametrize("rich", [True, False])
def test_the_command(rich, monkeypatch, capsys, tmp_path):
    if not rich:
        real = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith("rich"):
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
    out = tmp_path / "found.json"
    assert run("--json", str(out)) == selfcheck_cli.OK
    said = capsys.readouterr().out
    for words in ("down_proj", "decode", "not served", "16x24x32x4", "steers nothing", "verdict: "):
        assert words in said, words
    found = records.parse(json.loads(out.read_text()))
    assert found == verdicts.load(machine.of(CPU))[0]


def test_it_is_a_command_of_the_package(tmp_path):
    environment = os.environ | {verdicts.ENV: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "selfcheck", "--device", "cpu", "--dry-run"],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if has_kernel("forward", "CPU"):
        assert done.returncode == 0 and "would time 64 points" in done.stdout, done.stderr
        assert not list(tmp_path.iterdir()), "a dry run stores nothing"
    else:
        assert done.returncode == selfcheck_cli.NO_RUN


@BUILT
def test_nothing_is_stored_on_demand_and_clear_removes(capsys):
    path = verdicts.path_of(machine.of(CPU))
    assert run("--no-operators", "--no-store") == 0 and not path.exists()
    assert run("--no-operators") == 0 and path.exists()
    assert run("--clear") == 0 and not path.exists()
    assert run("--clear") == 0 and "no verdict of cpu" in capsys.readouterr().out


@BUILT
def test_a_folder_that_cannot_be_trusted_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(verdicts.ENV, str(tmp_path / "file"))
    assert run("--no-operators") == selfcheck_cli.NO_RUN
    assert "the verdict was not stored" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--shapes", "1x2x3"], ["--shapes", "0x8x8x8"], ["--shapes", "tiny"], ["--dtype", "fp64"],
     ["--device", "tpu"], ["--device", "mps"]],
)  # fmt: skip
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        selfcheck_cli.main(arguments)
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err


def test_the_conclusion_names_what_is_won():
    said: list[str] = []
    selfcheck_cli._conclusion(record(points(), backend="triton"), said.append)
    assert "takes triton, where cuda did not win, in 4 of 4 shape classes" in said[0]
    said.clear()
    selfcheck_cli._conclusion(record(points()), said.append)
    assert "takes cuda in 4 of 4 shape classes" in said[0] and "M 1024..4096" in said[1]
    said.clear()
    selfcheck_cli._conclusion(record(points(), [WRONG]), said.append)
    assert "WRONG RESULTS: forward_as decode" in said[0] and len(said) == 2


# ---- the suite's stage ---------------------------------------------------------------------------


def test_the_stage_is_what_the_command_takes_and_the_judge_reads(tmp_path):
    arguments = profiles.SELFCHECK[2:]
    parsed = selfcheck_cli._parser().parse_args([*arguments, "--device", "cuda", "--json", "x"])
    assert profiles.SELFCHECK[1] == "selfcheck" and parsed.no_store and parsed.no_operators
    assert shape_classes.classes(
        points(box=[sorted(set(sizes)) for sizes in zip(*parsed.shapes, strict=True)])
    ), "it measures whole classes"
    path, log = tmp_path / "selfcheck.json", tmp_path / "log"
    log.write_text("the last line")

    def judge(found: records.Record, code: int = 0) -> dict:
        path.write_text(json.dumps(records.dump(found)))
        return evidence.selfcheck(Finished(code, log), path)

    headline = judge(record(points()))["headline"]
    assert headline == "4 of 4 shape classes won, 64 points timed"
    with pytest.raises(Failed, match="wrong: forward_as decode"):
        judge(record(points(), [WRONG]))
    with pytest.raises(Failed, match="exit code 1"):
        judge(record(points()), 1)
    with pytest.raises(NotRun, match="the last line"):
        judge(record(points()), 2)
    with pytest.raises(NotRun, match="no point"):
        judge(record())

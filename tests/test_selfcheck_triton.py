"""`python -m lora_kernels selfcheck --backend triton`, on the CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_selfcheck import CPU, SHAPE, off_by, run, small  # small: a fixture of every test

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
    verdicts,
)
from lora_kernels.schemas import KERNELS
from lora_kernels.selfcheck import CannotRun

__all__ = ["small"]


@pytest.fixture
def kernels(monkeypatch) -> dict[str, SimpleNamespace]:
    """Composed in place of Triton's kernels and of their backend, on a CPU."""
    found = {name: SimpleNamespace(**{name: getattr(composed, name)}) for name in KERNELS}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, f"lora_kernels.triton_kernels.{name}", module)
    stand_in = replace(
        backends._REGISTRY["triton"], forward=composed.forward, backward=composed.backward,
        missing=lambda: None, refuses=lambda device, dtype: None, plan=None,
    )  # fmt: skip
    monkeypatch.setitem(backends._REGISTRY, "triton", stand_in)
    dispatch.reload()
    yield found
    monkeypatch.undo()
    dispatch.reload()


def test_the_kernels_of_triton_are_checked_and_no_operator_in_c(kernels, monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(torch.ops.lora_kernels, name, None)
    found = list(op_checks.run("triton", CPU, [torch.float32]))
    assert len(found) == op_checks.count([torch.float32], "triton")
    assert {(c.op, c.form, c.dropout) for c in found} == {
        (op, "", dropout) for op in (*KERNELS, op_checks.WHOLE) for dropout in (False, True)
    }
    assert {c.status for c in found} == {records.RIGHT}


@pytest.mark.parametrize("step", [1.0, float("nan")])
@pytest.mark.parametrize("op", KERNELS)
def test_a_wrong_element_of_a_kernel_of_triton_is_found(kernels, op, step):
    real, spoil = getattr(composed, op), off_by(step, 0)
    setattr(kernels[op], op, lambda *args: spoil(real(*args)))
    found = list(op_checks.run("triton", CPU, [torch.float32]))
    assert {c.op for c in found if c.status == records.WRONG} == {op}


def test_a_kernel_of_triton_that_cannot_be_imported_is_wrong(kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_kernels.triton_kernels.fused_gemm", None)
    found = [c for c in op_checks.run("triton", CPU, [torch.float32]) if c.status == records.WRONG]
    assert {c.op for c in found} == {"fused_gemm"} and "ModuleNotFoundError" in found[0].note


def test_triton_on_a_cpu_is_checked_and_steers_nothing(kernels):
    x = torch.randn(16, 32)
    before = lk.explain(x, x, x, x[:, :16])
    found = selfcheck.selfcheck("cpu", "triton", shapes=[SHAPE])
    assert found.wrong() == [] and found.backend == "triton" and found.points
    assert {c.op for c in found.checks} == {*KERNELS, op_checks.WHOLE}
    assert {p.dtype for p in found.points} == {"float32"}
    assert verdicts.load(machine.of(CPU, "triton"), "triton") == (found, "")
    assert verdicts.load(machine.of(CPU), "cpu") == (None, ""), "that of backend cpu is another"
    after = lk.explain(x, x, x, x[:, :16])
    assert after.backend == before.backend
    found = dispatch.evidence(CPU, "triton").find(torch.float32)
    assert not found.won and "a verdict of a CPU steers nothing" in found.why


def test_the_command_names_the_backend(kernels, capsys):
    path = verdicts.path_of(machine.of(CPU), "triton")
    assert run("--backend", "triton", "--dry-run") == selfcheck_cli.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "every operator and form of triton on cpu in float32" in said and path.name in said
    assert run("--backend", "triton") == selfcheck_cli.OK and path.exists()
    said = capsys.readouterr().out
    for words in ("operators of triton", "medians: triton against composed", "steers nothing"):
        assert words in said, words
    assert run("--clear") == 0 and "no verdict of cpu on cpu" in capsys.readouterr().out
    assert path.exists(), "a verdict of another backend stays"
    assert run("--clear", "--backend", "triton") == 0 and not path.exists()


def test_the_command_says_how_to_check_a_wrong_kernel_of_triton_again(kernels, capsys):
    kernels["weight_grad"].weight_grad = lambda *args: composed.weight_grad(*args) + 1
    assert run("--backend", "triton") == selfcheck_cli.KERNEL_WRONG
    said = capsys.readouterr().out
    assert "WRONG RESULTS: weight_grad. Do not use backend 'triton' here." in said
    assert "python -m lora_kernels selfcheck --backend triton again" in said
    assert verdicts.load(machine.of(CPU, "triton"), "triton")[0].wrong() == ["weight_grad"]


@pytest.mark.parametrize(
    ("printer", "words"),
    [(selfcheck_cli.Plain, "triton, 1 of 2: down_proj"), (selfcheck_cli.Rich, "triton: down_proj")],
)
def test_progress_names_the_backend(printer, words, monkeypatch, capsys):
    if printer is selfcheck_cli.Rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("FORCE_COLOR", "1")  # without a terminal rich shows no bar
    with printer().progress("triton") as told:
        told(1, 2, "down_proj")
    assert words in capsys.readouterr().out


def test_a_backend_that_cannot_be_checked_says_why(kernels, monkeypatch):
    with pytest.raises(CannotRun, match="backend is 'composed'; expected one of cuda, cpu, triton"):
        selfcheck.selfcheck("cpu", "composed")
    for changed in (
        dict(missing=lambda: "a reason"),
        dict(refuses=lambda device, dtype: "a reason" if dtype == torch.float32 else None),
    ):
        other = replace(backends._REGISTRY["triton"], **changed)
        monkeypatch.setitem(backends._REGISTRY, "triton", other)
        with pytest.raises(CannotRun, match="backend 'triton' cannot run here: a reason"):
            selfcheck.selfcheck("cpu", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotRun, match="--device cpu and TRITON_INTERPRET=1"):
        selfcheck.selfcheck("cuda", "triton")

"""Choosing a backend: the seam, the automatic order, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import problems
import pytest
import tolerance
import torch

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import composed


@pytest.fixture
def toy():
    """A backend as an outsider would add one: composed, with a count of its calls."""
    calls = []

    def forward(*args):
        calls.append("forward")
        return composed.forward(*args)

    def backward(*args):
        calls.append("backward")
        return composed.backward(*args)

    def refuses(device, dtype):
        return "toy does not do fp16" if dtype == torch.float16 else None

    backends.register(lk.Backend("toy", "a test", forward, backward, refuses=refuses), before="cpu")
    yield calls
    backends.unregister("toy")


def call(dtype=torch.float32, **kwargs):
    p = problems.make((9, 12, 20, 4), dtype)
    return lk.fused_lora_linear(p.x, p.weight, p.lora_a, p.lora_b, p.bias, **kwargs)


def test_a_registered_backend_serves(toy):
    problem = problems.make((17, 12, 20, 4), dropout_p=0.3)
    tolerance.assert_c1(problem, problem.run("toy"), eager_like=True)
    assert toy == ["forward", "backward"]
    problem.run(None)
    assert toy == ["forward", "backward"] * 2, "it stands first in the automatic order"
    call(torch.float16)
    assert len(toy) == 4, "automatic: what it refuses goes to the next"


def test_a_registered_backend_serves_compiled_code(toy):
    p = problems.make((9, 12, 20, 4))
    args = (p.x, p.weight, p.lora_a, p.lora_b)
    compiled = torch.compile(lk.fused_lora_linear, fullgraph=True, backend="aot_eager")
    expected = lk.fused_lora_linear(*args, backend="composed")
    assert torch.equal(compiled(*args, backend="toy"), expected) and toy == ["forward"]


def test_a_named_backend_serves_or_raises(toy):
    with pytest.raises(RuntimeError, match=r"backend='toy' was asked for.*toy does not do fp16"):
        call(torch.float16, backend="toy")
    with pytest.raises(
        RuntimeError, match=r"backend='cpu' was asked for.*no torch.float64 kernels"
    ):
        call(torch.float64, backend="cpu")
    with pytest.raises(
        ValueError, match=r"unknown backend 'nonsense'; expected None or one of.*cpu"
    ):
        call(backend="nonsense")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_fault_37_a_missing_backend_says_what_is_missing(name):
    missing = lk.backends()[name]
    if missing is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: "):
        call(backend=name)


def test_use_backend(toy):
    with lk.use_backend("toy"):
        call()
        assert toy == ["forward"]
        call(backend="composed")
        with lk.use_backend("composed"):
            call()
        assert toy == ["forward"]
        call()
    assert toy == ["forward"] * 2
    lk.use_backend("composed")
    call()
    lk.use_backend(None)
    assert toy == ["forward"] * 2
    with pytest.raises(ValueError, match="unknown backend"):
        lk.use_backend("nonsense")
    assert backends.selected() is None


def test_use_backend_can_be_kept_and_entered_again():
    forced = lk.use_backend("composed")
    lk.use_backend("reference")
    with forced:
        assert backends.selected() == "composed"
        with forced:
            assert backends.selected() == "composed"
        assert backends.selected() == "composed"
    assert backends.selected() == "reference"
    lk.use_backend(None)
    with forced:
        assert backends.selected() == "composed"
    assert backends.selected() is None


def test_explain(toy):
    p = problems.make((9, 12, 20, 4))
    args = (p.x, p.weight, p.lora_a, p.lora_b)
    found = lk.explain(*args)
    assert found.backend == "toy" and "not cuda" in str(found)
    assert set(found.passed_over) == set(lk.backends()) - {"toy"}
    found = lk.explain(*args, backend="composed")
    assert found.backend == "composed" and "backend argument" in found.reason
    with lk.use_backend("reference"):
        assert lk.explain(*args).backend == "reference"
    with torch.autocast("cpu", dtype=torch.float16):
        assert lk.explain(*args).passed_over["toy"] == "toy does not do fp16"
    with pytest.raises(ValueError, match="lora_a must be"):
        lk.explain(p.x, p.weight, p.lora_a[:, :3], p.lora_b)


def test_explain_names_what_runs(toy):
    """explain and the call agree, for every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        p = problems.make((9, 12, 20, 4), dtype)
        toy.clear()
        call(dtype)
        assert (lk.explain(p.x, p.weight, p.lora_a, p.lora_b).backend == "toy") == bool(toy)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_environment_variable():
    code = (
        "import torch, lora_kernels as lk; x = torch.ones(4, 4);"
        "print(lk.explain(x, x, x, x).backend, lk.explain(x, x, x, x, backend='cpu').backend)"
    )
    assert run_python(code, LORA_KERNELS_BACKEND="composed").stdout.split() == ["composed", "cpu"]
    bad = run_python(code, LORA_KERNELS_BACKEND="nonsense")
    assert bad.returncode != 0 and "unknown backend 'nonsense'" in bad.stderr


def test_import_is_quiet_and_light():
    """No warning, no CUDA context, no transformers behind the user's back."""
    code = (
        "import sys, lora_kernels, torch;"
        "print(torch.cuda.is_initialized(), 'transformers' in sys.modules)"
    )
    done = run_python(code, PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"] * 2 and done.stderr == ""


def test_report_command():
    done = subprocess.run([sys.executable, "-m", "lora_kernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in lk.backends():
        assert name in done.stdout


@pytest.mark.parametrize("name", ["cpu", "nonsense"])
def test_report_command_survives_a_bad_override(name):
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels"], capture_output=True, text=True,
        env={**os.environ, "LORA_KERNELS_BACKEND": name},
    )  # fmt: skip
    assert done.returncode == 0 and f"LORA_KERNELS_BACKEND={name}" in done.stdout, done.stderr

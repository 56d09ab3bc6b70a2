"""Fixtures: every backend that runs here, on CPU tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import pytest
import torch
from emulator import build
from torch.utils import cpp_extension
from triton_interpreter import INTERPRETED  # before anything imports Triton

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels.schemas import has_kernel, on_hopper

ON_GPU = {"cuda"} if INTERPRETED else {"cuda", "triton"}  # what serves no CPU tensor
USABLE = [n for n, missing in lk.backends().items() if missing is None and n not in ON_GPU]
OPERATORS = [name for name in USABLE if name != "reference"]  # which is plain PyTorch
INTERPRETED_FAST = 30  # of the cases of backend triton in its interpreter, one in so many is fast
SAMPLED = {  # the same of tests whose cases are emulated for seconds each
    "test_backward.py::test_shapes": 4,
    "test_group_kernels.py::test_forward_is_that_of_separate_calls": 3,
    "test_forward.py::test_shapes": 4,
    "test_forward.py::test_h_has_the_same_bits_in_both_forms": 3,
    "test_forward.py::test_progress_needs_no_residency": 3,
}

# No verdict of whoever runs the tests: this folder does not exist, tests that store take their own.
os.environ["LORA_KERNELS_CACHE"] = os.path.join(os.path.dirname(__file__), "no_such_cache")
if has_kernel("forward", "CPU"):
    backends.multiply_natively()  # the same kernels on every processor; test_native_gemm.py: native
torch.set_num_threads(1)  # xdist runs one worker a core; test_dropout.py tries more
# Criterion C1 allows one rounding of a product, and cuBLAS may round the parts of one to 16 bits.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
MEMORY = 2 << 30  # bytes that a worker may hold before it gives back what it has freed
POISON = "-ftrivial-auto-var-init=pattern"  # of scratch on the stack: since GCC 12, clang 8
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """The emulator's records leave gigabytes of free memory in a heap that only grows.

    And what one test compiled counts for no other: torch compiles a function a few times only.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if TRIM is None:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MEMORY:
        TRIM(0)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", USABLE)


@pytest.fixture
def eager_like(backend) -> bool:
    return backends.eager_like(backend, torch.bfloat16)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compiles and imports tests/NAME.cpp, a pybind11 module around sources of csrc."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")

    def load(name: str):
        target = tmp_path_factory.mktemp(name) / f"{name}.so"
        source = Path(__file__).with_name(f"{name}.cpp")
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        of_torch = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
        flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-psabi"]
        checks = ["-fsanitize=undefined", "-fno-sanitize-recover"]
        probe = [compiler, POISON, "-xc++", "-fsyntax-only", "/dev/null"]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            checks.append(POISON)
        folders = [*(f"-I{i}" for i in includes), *of_torch]
        command = [compiler, *flags, *checks, *folders, str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return build.load(target, name)

    return load


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels, compiled by g++ against tests/emulator."""
    pytest.importorskip("pybind11")
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    return build.load(build.build())


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by one with each call of a PEFT layer that the fused op serves."""
    from lora_kernels import peft_linear

    calls, run = [], peft_linear.fused_lora_linear

    def count(*args, **kwargs):
        calls.append(kwargs)
        return run(*args, **kwargs)

    monkeypatch.setattr(peft_linear, "fused_lora_linear", count)
    return calls


@pytest.fixture
def hopper():
    if not on_hopper(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0 and a build with sm_90a")


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` looks
def pytest_collection_modifyitems(items):
    for item in items:
        callspec = getattr(item, "callspec", None)
        name = item.nodeid.rpartition("/")[2]
        one_in = SAMPLED.get(name.partition("[")[0], 1)
        if zlib.crc32(name.encode()) % one_in != 0:
            item.add_marker(pytest.mark.slow)
        if INTERPRETED and callspec and "triton" in callspec.id.split("-"):
            sampled = zlib.crc32(item.nodeid.encode()) % INTERPRETED_FAST == 0
            if "test_training" in item.nodeid or not sampled:
                item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

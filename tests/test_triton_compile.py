"""The machine code of the Triton kernels for GPUs that are not here (tests/triton_offline.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("triton_offline.py")
CACHE = SCRIPT.parents[1] / "build/triton"
FAST = ("sm80", "sm90", "gfx942")
SLOW = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942")
pytestmark = pytest.mark.xdist_group("triton_compile")  # one worker waits for two compilers

# Bytes by target and dtype. Of six tiles tried for sm100's exact fp32 products none is without: at
# 80 to 168 registers of 255 ptxas spills two words or more.
ALLOWED_STACK = {("sm100", "fp32"): 8}

Kernels = list[dict]


def compile_for(target: str, *options: str) -> Kernels:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, *options],
        capture_output=True, text=True, env=env | {"TRITON_CACHE_DIR": str(CACHE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_many(targets: tuple[str, ...], *options: str) -> Kernels:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda target: compile_for(target, *options), targets)
        return [kernel for kernels in found for kernel in kernels]


@pytest.fixture(scope="module")
def fast() -> Kernels:
    return compile_many(FAST, "--dtypes", "bf16")


def name_of(kernel: dict) -> str:
    plan = " ".join(f"{k}={v}" for k, v in kernel["constants"].items())
    return f"{kernel['target']} {kernel['dtype']} {kernel['kernel']} {plan}"


def problems(kernel: dict) -> list[str]:
    """What must not be in the machine code of any kernel, and what must be in that of products."""
    name, dtype, target = kernel["kernel"], kernel["dtype"], kernel["target"]
    found = []
    if kernel["stack"] > ALLOWED_STACK.get((target, dtype), 0):
        found.append(f"{kernel['stack']} bytes of stack: it spills")
    if kernel["shared"] > kernel["limit"]:
        found.append(f"{kernel['shared']} bytes of shared memory, of {kernel['limit']}")
    if kernel.get("atomics"):
        found.append("atomics")
    if name == "reduce_kernel":
        return found
    if dtype != "fp32" and not kernel["tensor_core"]:
        found.append("no tensor-core instruction")
    if dtype == "fp32" and kernel["tensor_core"]:
        found.append("tensor-core instructions, though TF32 is off")
    if target == "sm90" and dtype != "fp32" and kernel["vectors"] and not kernel["wgmma"]:
        found.append("no wgmma")
    if target == "sm100" and name == "fused_gemm_kernel" and dtype != "fp32":
        described = kernel["constants"]["DESCRIPTORS"] == "True"
        if described and not kernel["tcgen05"]:
            found.append("no tcgen05.mma")
    if "wgmma" in kernel:
        described = kernel["constants"].get("DESCRIPTORS") == "True"
        if described and not kernel["tma_loads"]:
            found.append("descriptors without TMA loads")
        if not described and not kernel["async_copies"] and kernel["vectors"]:
            found.append("loads are not asynchronous: the loop has no pipeline")
    return found


def check(kernels: Kernels) -> None:
    found = [f"{name_of(k)}: {what}" for k in kernels for what in problems(k)]
    assert not found, "\n".join(found)


def test_machine_code(fast):
    check(fast)


def test_every_kernel_is_compiled_for_every_target(fast):
    for target in FAST:
        expected = {"down_proj_kernel", "fused_gemm_kernel", "weight_grad_kernel", "reduce_kernel"}
        if target != "sm80":
            expected.add("down_and_weight_grad_kernel")
        assert {k["kernel"] for k in fast if k["target"] == target} == expected


def test_hopper_loads_the_frozen_product_by_tma(fast):
    large = [k for k in fast if k["target"] == "sm90" and k["kernel"] == "fused_gemm_kernel"]
    assert any(k["tma_loads"] for k in large)


@pytest.mark.slow
def test_fp32_is_exact():
    check(compile_for("sm90", "--dtypes", "fp32"))


def test_problems_are_found():
    sound = {
        "kernel": "down_proj_kernel", "dtype": "bf16", "target": "sm90", "constants": {},
        "stack": 0, "shared": 10, "limit": 20, "atomics": 0, "tensor_core": 4, "wgmma": 4,
        "tcgen05": 0, "tma_loads": 0, "async_copies": 3, "vectors": True,
    }  # fmt: skip
    assert problems(sound) == []
    for change, message in (
        ({"stack": 8}, "8 bytes of stack: it spills"),
        ({"shared": 21}, "21 bytes of shared memory, of 20"),
        ({"atomics": 1}, "atomics"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
        ({"wgmma": 0}, "no wgmma"),
        ({"async_copies": 0}, "loads are not asynchronous: the loop has no pipeline"),
        ({"constants": {"DESCRIPTORS": "True"}}, "descriptors without TMA loads"),
    ):
        assert problems(sound | change) == [message]


@pytest.mark.slow
def test_machine_code_of_every_class():
    check(compile_many(SLOW, "--all", "--dtypes", "bf16,fp16,fp32"))


def test_scalars_compile_nothing_anew():
    """scaling, p, M and the rank within its class: one kernel serves them all."""
    counts = compile_for("sm90", "--recompiles")
    assert counts[0]["first"] > 0 and counts[0]["more"] == []

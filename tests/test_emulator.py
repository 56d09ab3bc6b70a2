"""The emulator's own rules: each report is provoked by one mistake, and by nothing but it."""

from __future__ import annotations

import re

import pytest
from emulator import build

PTX = build.ROOT / "csrc/cuda/ptx.cuh"
MODEL = build.EMULATOR / "ptx.h"
FUNCTION = re.compile(r"^LK_PTX [\w:]+ (\w+)\(", re.MULTILINE)
TIMINGS = ("early", "late", "random")
MISUSES = re.findall(r"^    CASE\((\w+),", (build.EMULATOR / "misuse.cpp").read_text(), re.M)


def test_every_instruction_has_a_model():
    """The names on both sides are the same, so no kernel can use what is not modelled."""
    real, model = (set(FUNCTION.findall(p.read_text())) for p in (PTX, MODEL))
    assert real == model and len(real) > 40


def test_no_kernel_hides_an_instruction():
    """Inline PTX and raw barriers stand in ptx.cuh alone: elsewhere the emulator is blind."""
    for path in (build.ROOT / "csrc/cuda").glob("*.cu*"):
        if path != PTX:
            found = re.findall(r"\basm\b|__syncthreads|__shfl|__shared__", path.read_text())
            assert not found, f"{path.name}: {found}"


def test_tensor_maps_are_grid_constants():
    """The emulator cannot know: TMA reads the map through its address, so it must not be a copy."""
    for path in [*(build.ROOT / "csrc/cuda").glob("*.cu*"), build.EMULATOR / "probes.cuh"]:
        for kernel in re.findall(r"__global__[^{;]*", path.read_text()):
            constants = re.findall(r"const __grid_constant__ (?:\w+<)?ptx::TensorMap", kernel)
            assert kernel.count("TensorMap") == len(constants)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", MISUSES)
def test_right_kernels_pass(emulated, name, timing):
    for schedule in range(4):
        emulated.misuse(name, False, schedule, timing)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", MISUSES)
def test_mistakes_are_reported_with_their_place(emulated, name, timing):
    """Under every timing and order: what is wrong is proven, not stumbled upon."""
    expected = dict(emulated.misuse_cases())[name]
    for schedule in range(4):
        with pytest.raises(emulated.EmulatorError) as report:
            emulated.misuse(name, True, schedule, timing)
        text = str(report.value)
        assert re.search(expected, text, re.DOTALL), text
        assert re.search(r"misuse_\w+\.h:\d+", text), text

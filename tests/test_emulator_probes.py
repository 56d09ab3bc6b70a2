"""Whole mechanisms in the emulator: a persistent cluster GEMM, and a relay through flags."""

from __future__ import annotations

import ctypes
import subprocess

import gates
import numpy as np
import pytest
import torch
from emulator import build
from emulator.suite import SCHEDULES, bf16


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def ternary(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Sums of products of a few hundred of these stay below 2^8: bf16 holds them."""
    return rng.integers(-1, 2, shape) * (rng.random(shape) < 0.4)


def run_gemm(emulated, shape, tile_n=128, trans=(False, False), clusters=2, **schedule):
    m, n, k = shape
    rng = np.random.default_rng(sum(shape))
    a, b = ternary(rng, m, k), ternary(rng, n, k)
    left = np.ascontiguousarray(bf16(a.T if trans[0] else a))
    right = np.ascontiguousarray(bf16(b.T if trans[1] else b))
    c = np.zeros((m, n), np.uint16)
    arguments = {"schedule": 0, "timing": "random", "resident_blocks": 1 << 20} | schedule
    emulated.gemm_probe(left, right, c, tile_n, *trans, clusters, *arguments.values())
    assert np.array_equal(from_bf16(c), a @ b.T)


# M, N, K: an exact tile; every dimension ragged; a last cluster whose second block has no rows
SHAPES = [(256, 128, 64), (328, 200, 200), (72, 136, 328)]


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
@pytest.mark.parametrize("trans", [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cluster_gemm(emulated, shape, trans, timing, schedule):
    run_gemm(emulated, shape, trans=trans, timing=timing, schedule=schedule)


@pytest.mark.parametrize("trans", [(False, False), (False, True)])
def test_wide_tiles(emulated, trans):
    run_gemm(emulated, (300, 520, 136), tile_n=256, trans=trans, clusters=3)


def test_fewer_clusters_than_tiles_and_than_room(emulated):
    for resident in (2, 4):
        run_gemm(emulated, (520, 264, 72), clusters=3, resident_blocks=resident, schedule=resident)


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
@pytest.mark.parametrize("grids", [1, 2])
@pytest.mark.parametrize("resident", [1, 2, 16])
def test_relay(emulated, resident, grids, timing, schedule):
    """Progress with any residency, and two grids at once do not disturb each other."""
    rng = np.random.default_rng(resident)
    tiles = 5
    source = rng.integers(0, 1 << 15, (64 * tiles, 64)).astype(np.uint16)
    h = [np.zeros_like(source) for _ in range(grids)]
    out = [np.zeros_like(source) for _ in range(grids)]
    emulated.relay_probe(source, h, out, 4, schedule, timing, resident)
    assert all(np.array_equal(o, source) for o in out)


def test_schedules_differ(emulated):
    """Different seeds give different executions; the same seed gives the same one."""
    x = np.zeros((128, 256), np.uint16)
    down, h = np.zeros((16, 256), np.uint16), np.zeros((128, 16), np.uint16)

    def rounds(seed: int) -> int:
        found = emulated.down_proj(x, down, h, True, [], 0, 1.0, 90, 4, schedule=seed)
        return found["rounds"]

    assert rounds(1) == rounds(1)
    assert len({rounds(seed) for seed in range(8)}) > 1


# ---- the same kernels on a device: what the emulator assumes of the hardware --------------------


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> ctypes.CDLL:
    """probes.cu, compiled by the nvcc of this machine."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the probes are for compute capability 9.0")
    nvcc = gates.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    library = tmp_path_factory.mktemp("probes") / "probes.so"
    sources = [build.EMULATOR / "probes.cu", build.ROOT / "csrc/cuda/encode_tensor_map.cpp"]
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC"]
    command = [nvcc, *gates.nvcc_flags(), *target, "-o", str(library), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.gpu
@pytest.mark.parametrize("tile_n", [128, 256])
@pytest.mark.parametrize("trans", [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1536, 2048)])
def test_cluster_gemm_on_the_gpu(probes, shape, trans, tile_n):
    m, n, k = shape
    g = torch.Generator(device="cuda").manual_seed(m)
    a, b = (
        torch.randint(-1, 2, (rows, k), generator=g, device="cuda").bfloat16() for rows in (m, n)
    )
    a, b = (t * (torch.rand(t.shape, generator=g, device="cuda") < 30 / k) for t in (a, b))
    left, right = (t.t().contiguous() if f else t for t, f in zip((a, b), trans, strict=True))
    c = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()  # the probe runs in the default stream
    arguments = (pointer(left), pointer(right), pointer(c), m, n, k, tile_n, *map(int, trans))
    assert probes.probe_gemm(*arguments) == 0
    assert torch.equal(c.double(), a.double() @ b.double().t())


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 7, 5000])
def test_relay_on_the_gpu(probes, blocks):
    """5000 blocks are more than fit: progress must not need all of them at once."""
    tiles = 600
    source = torch.randn(64 * tiles, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        h, out = (torch.full_like(source, torch.nan) for _ in range(2))
        words = torch.zeros(1 + tiles, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        arguments = (pointer(source), pointer(h), pointer(out), pointer(words), tiles, blocks)
        assert probes.probe_relay(*arguments) == 0
        assert torch.equal(out, source)

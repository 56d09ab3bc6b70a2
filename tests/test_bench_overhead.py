"""Host time of a call: what is timed on which device, and Triton's launchers without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import bench_overhead  # noqa: E402


def test_overhead_has_the_host_time_of_triton_s_launchers(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "overhead.json"
    some = ("--rounds", "3", "--calls", "2", "--dropout", "0.1", "--json", str(out))
    command = [sys.executable, "-m", "bench.bench_overhead", *some]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    groups = [group for group in found["groups"] if group["device"] == "cpu"]
    assert len(groups) == 2 * len(bench_overhead.MODES)
    assert all(
        "backend triton" not in [row["name"] for row in group["rows"]] for group in groups
    ), "not on a CPU"
    launches = {row["name"]: row for row in found["triton_launches"]}
    kernels = ("down_proj", "fused_gemm", "weight_grad", "down_and_weight_grad")
    assert set(launches) == {f"triton launch: {name}" for name in (*kernels, "forward", "backward")}
    assert all(0 < row["min_us"] <= row["median_us"] for row in launches.values())


@pytest.mark.gpu
def test_overhead_has_the_backends_of_a_gpu():
    x = torch.zeros(8, 8, device="cuda", dtype=torch.bfloat16)
    found = bench_overhead.layers(0.1, x)
    for name in bench_overhead.ON_GPU:
        assert (f"backend {name}" in found) == (lora_kernels.backends()[name] is None)
    for layer in found.values():
        assert layer(x).shape == x.shape

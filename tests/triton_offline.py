"""Compiles what Triton's launchers launch for a GPU that is not here, and reads the machine code.

    python tests/triton_offline.py sm90 [--all]    a line of JSON per kernel

The launchers run as they are, on CPU tensors that nothing reads: a driver that only names a target
stands in for the GPU's, so specialisations are those of real calls. A process of its own, since
Triton's interpreter, once chosen, stays.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.triton_driver import Named  # noqa: E402
from lora_kernels.triton_kernels import configs, device  # noqa: E402
from lora_kernels.triton_kernels.down_proj import down_proj  # noqa: E402
from lora_kernels.triton_kernels.fused_gemm import fused_gemm  # noqa: E402
from lora_kernels.triton_kernels.weight_grad import (  # noqa: E402
    down_and_weight_grad,
    grad_and_sums,
    one_read,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# name -> target, family of configs.json, bytes of shared memory that a block may have
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), "sm80", 163 << 10),
    "sm86": (GPUTarget("cuda", 86, 32), "sm80", 99 << 10),
    "sm90": (GPUTarget("cuda", 90, 32), "sm90", 227 << 10),
    "sm100": (GPUTarget("cuda", 100, 32), "sm100", 227 << 10),
    "sm120": (GPUTarget("cuda", 120, 32), "sm80", 99 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amd", 64 << 10),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
M, N, K = 8192, 4096, 2048
FEW = 48  # rows that take other tiles
SEED, WINDOW = torch.tensor([5, 6]), torch.tensor([5, 6, 16, 3])
THRESHOLD = 1638


class Recorder:
    """Stands in for JITFunction.run: compiles and keeps what would have been launched."""

    def __init__(self):
        self.kernels, self._run, self._lookup = [], JITFunction.run, configs.lookup
        self.width = ""  # of the plan that was looked up last

    def install(self):
        run, kernels = self._run, self.kernels

        def lookup(kernel, family, width, *sizes):
            self.width = width
            return self._lookup(kernel, family, width, *sizes)

        def record(self, *args, grid, warmup, **kwargs):
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
            constants = {k: v for k, v in kwargs.items() if k not in ("num_warps", "num_stages")}
            constants["vectors"] = "scattered" not in recorder.width
            kernels.append((self.fn.__name__, constants, compiled))
            return compiled

        recorder, JITFunction.run, configs.lookup = self, record, lookup


def calls(dtype: torch.dtype, everything: bool):
    """Launches of each kernel: every class of its table, masks, both majors, odd widths."""

    def empty(*size):
        return torch.empty(*size, dtype=dtype)

    ranks = (8, 16, 24, 40, 48, 64, 100, 128, 256) if everything else (8, 16, 64)
    seeds = (None, SEED, WINDOW) if everything else (None, SEED)
    x, dy, weight = empty(M, K), empty(M, N), empty(N, K)
    for r in ranks:
        a, b, h = empty(r, K), empty(N, r), empty(M, r)
        for seed in seeds:
            down_proj(x, a, seed, THRESHOLD, 1.5)
            grad_and_sums(h, x, seed, THRESHOLD, 1.5, False, False, False)
        down_proj(dy, b.t(), None, 0, 1.5)
        if one_read(dy, r):
            down_and_weight_grad(h, dy, b.t(), 1.5, 1.0, True, True, True)
        if not one_read(dy, r) or everything:
            grad_and_sums(h, dy, None, 0, 1.5, True, True, True)
    few = ((M, 16), (FEW, 16))
    for rows, r in (*((M, r) for r in ranks), (700, 16), (FEW, 16)) if everything else few:
        h = empty(rows, r)
        a, b = empty(r, K), empty(N, r)
        fused_gemm(empty(rows, K), weight, h, b, empty(N), None, 0, 1.0)
        for seed in seeds:
            fused_gemm(empty(rows, N), weight.t(), h, a.t(), None, seed, THRESHOLD, 1.0)
    if everything:  # nothing that TMA can address, nothing that divides
        fused_gemm(empty(M, 2047), empty(4095, 2047), empty(M, 7), empty(4095, 7), None, None, 0, 1)
        down_proj(empty(M, 2047), empty(7, 2047), SEED, THRESHOLD, 1.0)


def recompiled() -> dict:
    """How many kernels a first call takes, and what calls of other scalars and M compile more."""
    recorder = Recorder()
    recorder.install()
    dtype = torch.bfloat16

    def empty(*size):
        return torch.empty(*size, dtype=dtype)

    def call(m, r, scale, threshold, seed):
        x, dy, weight = empty(m, K), empty(m, N), empty(N, K)
        h = down_proj(x, empty(r, K), seed, threshold, scale)
        fused_gemm(x, weight, h, empty(N, r), None, None, 0, scale)
        fused_gemm(dy, weight.t(), h, empty(r, K).t(), None, seed, threshold, scale)
        grad_and_sums(h, x, seed, threshold, scale, False, False, False)
        down_and_weight_grad(h, dy, empty(N, r).t(), scale, scale, True, True, False)

    def compiled() -> dict[str, str]:
        return {kernel.hash: name for name, _, kernel in recorder.kernels}

    call(20000, 16, 1.5, 1638, SEED)
    call(4000, 16, 1.5, 1638, SEED)  # the sums of some are split here, and results are fp32 parts
    first = compiled()
    for m, scale, threshold in ((8193, 1, 1638), (5000, 0.3, 1), (12345, 2.0, 16000)):
        call(m, 16, float(scale), threshold, torch.tensor([m, 1 << 40]))
    more = [name for key, name in compiled().items() if key not in first]
    return {"first": len(first), "more": more}


def describe(name: str, constants: dict, kernel) -> dict:
    """What the machine code of one kernel shows."""
    about = {"kernel": name, "constants": {k: str(v) for k, v in constants.items()}}
    about["vectors"] = about["constants"].pop("vectors") == "True"
    about |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        scratch = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
        registers = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        return about | {
            "registers": max(map(int, registers)),
            "stack": max(map(int, scratch)),
            # v_mfma_f32_..._f32 is exact: it is no less than fp32 asks for
            "tensor_core": len(re.findall(r"v_mfma_f32_\w*(?:bf16|_f16|xf32)", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return about | {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "tensor_core": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--all", action="store_true", help="every class and variant")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--recompiles", action="store_true", help="what other scalars compile")
    args = parser.parse_args()
    target, family, limit = TARGETS[args.target]
    triton.runtime.driver.set_active(Named(target))
    device.family = lambda of: family
    if args.recompiles:
        print(json.dumps(recompiled()))
        return 0
    recorder = Recorder()
    recorder.install()
    for name in args.dtypes.split(","):
        before = len(recorder.kernels)
        calls(DTYPES[name], args.all)
        seen = set()
        for kernel in recorder.kernels[before:]:
            if kernel[2].hash not in seen:
                seen.add(kernel[2].hash)
                about = {"target": args.target, "dtype": name, "limit": limit}
                print(json.dumps(about | describe(*kernel)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

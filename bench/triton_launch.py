"""`python -m bench.triton_launch CALLS ROUNDS`: host time of a call of each Triton launcher.

The launchers run as they are, for a Hopper GPU that is not there, by a driver that launches
nothing: the time is that of choosing plans, allocating results and going through Triton, without
the CUDA driver's. Prints the samples' summaries as JSON; `bench.bench_overhead` shows them.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
from triton.backends.compiler import GPUTarget

from lora_kernels.triton_kernels import device, flow
from lora_kernels.triton_kernels.down_proj import down_proj
from lora_kernels.triton_kernels.fused_gemm import fused_gemm
from lora_kernels.triton_kernels.weight_grad import down_and_weight_grad, weight_grad

from . import timing
from .triton_driver import Idle

TARGET, FAMILY, SHARED = GPUTarget("cuda", 90, 32), "sm90", 227 << 10
M, N, K, R = 1024, 1024, 1024, 16  # sums are split, tiles are TMA's: the longest way for the host
THRESHOLD = 1638


def calls() -> dict[str, Callable[[], object]]:
    """Each launcher with a mask where it may have one, and a whole forward and backward pass."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16)

    x, dy, weight, bias = empty(M, K), empty(M, N), empty(N, K), empty(N)
    a, b, h = empty(R, K), empty(N, R), empty(M, R)
    drop = torch.tensor([1, 2]), THRESHOLD
    adapters = x, weight, a, b
    needs = (False, False, True, True, True, False)
    return {
        "down_proj": functools.partial(down_proj, x, a, *drop, 1.5),
        "fused_gemm": functools.partial(fused_gemm, x, weight, h, b, bias, None, 0, 1.0),
        "weight_grad": functools.partial(weight_grad, h, x, *drop, 1.0, False, False),
        "down_and_weight_grad": functools.partial(
            down_and_weight_grad, h, dy, b.t(), 1.5, 1.0, False, True, False
        ),
        "forward": functools.partial(flow.forward, *adapters, bias, *drop, 1.5, 1.0),
        "backward": functools.partial(flow.backward, dy, *adapters, h, *drop, 1.5, 1.0, *needs),
    }


def main() -> int:
    number, rounds = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Idle(TARGET, SHARED))
    device.family = lambda of: FAMILY
    found = calls()
    for call in found.values():  # compiles
        for _ in range(number):
            call()
    timed = timing.interleave(found, timing.HostTimer(number), rounds)
    print(json.dumps({name: asdict(summary) for name, summary in timed.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

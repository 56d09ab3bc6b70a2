"""Interleaved timing of callables in one process, and the memory a call needs."""

from __future__ import annotations

import os

import torch

from lora_kernels.timing import (
    MINIMUM_SAMPLES,
    WARM_UP_CALLS,
    Call,
    CudaTimer,
    HostTimer,
    Summary,
    interleave,
    make_timer,
)

__all__ = [
    "MINIMUM_SAMPLES",
    "WARM_UP_CALLS",
    "Call",
    "CudaTimer",
    "HostTimer",
    "Summary",
    "interleave",
    "make_timer",
    "peak_extra_bytes",
]


def peak_extra_bytes(call: Call, device: str) -> int:
    """The most bytes of tensors that one call holds beyond those that were there before it.

    Outputs count. What a library allocates behind torch's allocator, such as the packed operands of
    a CPU GEMM, is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and stop on stderr
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak

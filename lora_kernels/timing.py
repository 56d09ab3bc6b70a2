"""Interleaved timing of callables in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MINIMUM_SAMPLES = 3
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
WARM_UP_CALLS = {"cpu": 1, "cuda": 5}

Call = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    """Of the samples of one contender, in milliseconds per call."""

    samples: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    iqr_ms: float
    min_ms: float

    @classmethod
    def of(cls, samples: list[float]) -> Summary:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(len(samples), median, q1, q3, q3 - q1, min(samples))


class HostTimer:
    """Milliseconds per call by the host's clock, over `calls` calls in a row."""

    def __init__(self, calls: int = 1):
        self.calls = calls

    def __call__(self, call: Call) -> float:
        start = time.perf_counter_ns()
        for _ in range(self.calls):
            call()
        return (time.perf_counter_ns() - start) / self.calls * 1e-6


class CudaTimer:
    """Milliseconds of one call between two CUDA events, with an L2 cache full of something else.

    That is read, not written: lines to be written back would count for the call. The host runs
    ahead meanwhile, so a call's launches are queued unless there are many.
    """

    def __init__(self):
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.amax()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def make_timer(device: str) -> HostTimer | CudaTimer:
    return CudaTimer() if device == "cuda" else HostTimer()


def interleave(
    calls: Mapping[str, Call],
    timer: Callable[[Call], float],
    rounds: int,
    seconds: float = 1e9,
) -> dict[str, Summary]:
    """Times `calls`, which are warm, in turns: a slow spell of the machine hits all of them.

    One untallied sample of each sets how many it gets: `rounds`, or as many as fit into its equal
    share of `seconds`, but at least MINIMUM_SAMPLES. A contender with fewer is spread over all
    rounds. Each round has a new order, so that none always runs behind the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    share = 1e3 * seconds / len(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        quota = {}
        for name, call in calls.items():
            affordable = int(share / max(timer(call), 1e-6))  # clocks may read 0
            quota[name] = max(MINIMUM_SAMPLES, min(rounds, affordable))
        total = max(quota.values())
        order = list(calls)
        for turn in range(total):
            shuffle(order)
            for name in order:
                if (turn + 1) * quota[name] // total > turn * quota[name] // total:
                    samples[name].append(timer(calls[name]))
    finally:
        gc.enable()
    return {name: Summary.of(taken) for name, taken in samples.items()}

"""Clocks, temperature and power of the GPU, by nvidia-smi, which only reads them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

FIELDS = {  # nvidia-smi's name -> ours, with the unit
    "clocks.sm": "sm_mhz",
    "clocks.mem": "mem_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "utilization.gpu": "busy_percent",
}
FACTS = (
    "name",
    "driver_version",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "mig.mode.current",
)
PERIOD = 1.0  # seconds between samples
TIMEOUT = 5.0


class Monitor:
    """Queries one GPU; after one query that fails, it makes no more: a hang would cost each stage.

    Args:
        gpu: nvidia-smi's --id: an index or a UUID.
        program: nvidia-smi.
    """

    def __init__(self, gpu: str = "0", program: str = "nvidia-smi"):
        self._gpu, self._program = gpu, program
        self.problem = None if shutil.which(program) else f"no {program}"

    def _query(self, fields: tuple[str, ...]) -> list[str] | None:
        if self.problem is not None:
            return None
        command = [self._program, f"--query-gpu={','.join(fields)}", f"--id={self._gpu}"]
        try:
            ran = subprocess.run(
                [*command, "--format=csv,noheader,nounits"],
                capture_output=True, text=True, timeout=TIMEOUT, check=True,
            )  # fmt: skip
            values = [value.strip() for value in ran.stdout.strip().split(",")]
            if len(values) != len(fields):
                raise ValueError(f"unexpected answer {ran.stdout.strip()[:200]!r}")
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            self.problem = f"nvidia-smi: {error}"
            return None
        return values

    def facts(self) -> dict:
        """What does not change: name, driver, limits; {"problem": ...} if it does not answer."""
        values = self._query(FACTS)
        if values is None:
            return {"problem": self.problem}
        return dict(zip(FACTS, values, strict=True))

    def now(self) -> dict | None:
        """The FIELDS at this moment; a value that the driver withholds is None."""
        values = self._query(tuple(FIELDS))
        if values is None:
            return None
        return {name: _number(v) for name, v in zip(FIELDS.values(), values, strict=True)}

    @contextlib.contextmanager
    def sampling(self) -> Iterator[dict]:
        """Polls `now` until the block ends, then fills the dict: series, lowest, highest.

        A sample of the series is [time.time(), value of each of FIELDS]: with the time at which a
        table of a benchmark had `ended`, it tells the state of the GPU under each timing.
        """
        found: dict = {}
        samples: list[dict] = []
        times: list[float] = []
        done = threading.Event()

        def poll() -> None:
            while not done.wait(PERIOD):
                if (sample := self.now()) is None:
                    return
                times.append(round(time.time(), 1))
                samples.append(sample)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join(TIMEOUT + 1)
            rows = zip(times, (sample.values() for sample in samples), strict=False)
            found["series"] = [[at, *values] for at, values in rows]
            for key, pick in (("lowest", min), ("highest", max)):
                found[key] = {name: _extreme(pick, samples, name) for name in FIELDS.values()}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _extreme(pick, samples: list[dict], name: str) -> float | None:
    values = [sample[name] for sample in samples if sample[name] is not None]
    return pick(values) if values else None

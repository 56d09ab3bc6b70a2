"""Random calls for a given time: values that must be right, arguments that must not crash.

    python tests/fuzz.py                                        10 minutes, a seed of the clock
    python tests/fuzz.py --seconds 60 --seed 7 --backend cpu    again the calls of seed 7
    python tests/fuzz.py --what arguments --calls 2000          no more calls, however fast

Each half runs in a process of its own, so a crash is caught and its call, written down before it
was made, is named. What fails is made as small as it gets and printed as a line for fuzz_cases.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import hypothesis

HALVES = {"values": "fuzz_values", "arguments": "fuzz_arguments"}
BATCH = 100  # examples between two looks at the clock of hypothesis, which has none
ON_CPU = ("cpu", "composed", "reference")  # triton's interpreter takes seconds a call: by name


def search(
    strategy, check: Callable, seconds: float, seed: int, note: Callable, most: int = sys.maxsize
) -> tuple:
    """(calls made, the smallest that failed or None, its error).

    The same seed makes the same calls, `most` at most; only their number depends on the machine.
    """
    end, made = time.monotonic() + seconds, 0
    failed, error = None, None

    def one(case) -> None:
        nonlocal made, failed, error
        if failed is None and (time.monotonic() > end or made == most):
            return
        made += 1
        note(case)
        try:
            check(case)
        except BaseException as found:
            failed, error = case, found  # the last that hypothesis tries is the smallest
            raise

    batch = 0
    while failed is None and time.monotonic() < end and made < most:
        quiet = hypothesis.settings(
            max_examples=BATCH, database=None, deadline=None, report_multiple_bugs=False,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        run = hypothesis.seed(seed * 1_000_003 + batch)(quiet(hypothesis.given(strategy)(one)))
        try:
            run()
        except BaseException as found:
            if failed is None or isinstance(found, KeyboardInterrupt):
                raise
        batch += 1
    return made, failed, error


def half(
    what: str, seconds: float, seed: int, backends: tuple[str, ...], last: Path,
    most: int = sys.maxsize,
) -> int:  # fmt: skip
    """One half in this process; writes each call to `last` before it makes it."""
    module = importlib.import_module(HALVES[what])

    def note(case) -> None:
        last.write_text(f"{case!r}\n")

    made, failed, error = search(module.cases(backends), module.check, seconds, seed, note, most)
    if error is None:
        print(f"{what}: {made} calls are right, seed {seed}")
        return 0
    print(f"{what}: call {made} of seed {seed}, made as small as it gets, fails:\n    {failed!r},")
    print("".join(traceback.format_exception(error, limit=-6)))
    return 1


def apart(what: str, seconds: float, seed: int, backends: tuple[str, ...], most: int) -> int:
    """One half in a process of its own, which may crash; what it says is printed here."""
    importlib.import_module(HALVES[what])  # before the fork, so that the time goes into calls
    with tempfile.TemporaryDirectory() as folder:
        last, said = Path(folder, "last_call"), Path(folder, "said")

        def child() -> None:
            with said.open("w") as out, contextlib.redirect_stdout(out):
                code = half(what, seconds, seed, backends, last, most)
            sys.exit(code)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        print(said.read_text(), end="")
        code = process.exitcode
        assert code is not None
        if code < 0:
            name = signal.Signals(-code).name
            print(f"{what}: the process died of {name}, seed {seed}:\n    {last.read_text()}")
    return abs(code)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="of both halves together")
    parser.add_argument("--calls", type=int, default=sys.maxsize, help="of each half, at most")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--backend", action="append", help=f"default: {', '.join(ON_CPU)}")
    parser.add_argument("--what", choices=HALVES, help="default: one after the other")
    asked = parser.parse_args(args)
    halves = [asked.what] if asked.what else list(HALVES)
    seconds, backends = asked.seconds / len(halves), tuple(asked.backend or ON_CPU)
    return max(apart(what, seconds, asked.seed, backends, asked.calls) for what in halves)


if __name__ == "__main__":
    sys.exit(main())

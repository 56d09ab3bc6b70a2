"""Stages: commands that run one after another, each under a time limit.

Nothing here knows what the stages do, needs a GPU, or imports anything but the standard library: a
broken torch must not keep the record from being written.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
SKIP_MARK = "not run: "  # begins the line by which a command says why it did nothing
REAP_SECONDS = 5.0  # a process stuck in the driver may ignore even SIGKILL
DEADLINE = "STAGE_DEADLINE"  # of a command's environment: when it is killed, in time.time()


def skip(reason: str) -> int:
    """Says that the command did nothing, and why; returns its exit code."""
    print(SKIP_MARK + reason)
    return 77


def seconds_left() -> float:
    """Of the stage whose command this process is, or was started by; infinite outside of one."""
    return float(os.environ.get(DEADLINE, "inf")) - time.time()


class NotRun(Exception):
    """What a stage would do cannot be done here; the message says why."""


class Failed(Exception):
    """A command exited with 0, but what it left is no proof; the message says why."""


@dataclass(frozen=True)
class Finished:
    """A command that ended within its limit."""

    code: int
    log: Path  # stdout and stderr

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def skipped(self) -> str | None:
        """The reason, if the command passed one to `skip`. A tool around it may change the code."""
        lines = [line for line in self.text().splitlines() if line.startswith(SKIP_MARK)]
        return lines[0].removeprefix(SKIP_MARK) if lines and self.code != 0 else None

    def last_line(self) -> str:
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it printed nothing"


def exit_code(finished: Finished) -> dict:
    """The judge of a command that says it all by its exit code."""
    if finished.code != 0:
        raise Failed(f"exit code {finished.code}: {finished.last_line()}")
    return {}


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: of the stage and of its log.
        limit: seconds after which the command and all that it started are killed.
        command: what to run; raises NotRun where that is impossible.
        judge: the summary, with `headline` for the table; raises Failed or NotRun.
        environment: variables beside those of this process.
        sampled: whether the GPU's state is polled meanwhile: for stages that measure time.
        needs: stages that must not have failed before this one.
    """

    name: str
    limit: float
    command: Callable[[], list[str]]
    judge: Callable[[Finished], dict] = exit_code
    environment: Mapping[str, str] = field(default_factory=dict)
    sampled: bool = False
    needs: tuple[str, ...] = ()


class NoMonitor:
    """Stands in for `gpu_state.Monitor` where there is no GPU to watch."""

    def now(self) -> dict | None:
        return None

    def sampling(self) -> contextlib.AbstractContextManager[dict]:
        return contextlib.nullcontext({})


def kill(process: subprocess.Popen, with_group: bool = True) -> None:
    """Kills a process; if it leads a group, with the group."""
    with contextlib.suppress(ProcessLookupError):
        if with_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(REAP_SECONDS)


def execute(
    command: list[str], limit: float, log: Path, environment: Mapping[str, str], cwd: Path,
    own_group: bool = True,
) -> int | None:  # fmt: skip
    """Runs a command with its output in `log`: its exit code, or None if the limit ended it.

    With it ends what it has started, unless it has no group of its own: then that ends with ours.
    The output goes to a file, not through a pipe: a process that outlives the group cannot make
    this one wait for the pipe to close.
    """
    deadline = time.time() + min(limit, seconds_left())
    with log.open("wb") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", DEADLINE: str(deadline), **environment},
            start_new_session=own_group,
        )  # fmt: skip
        try:
            return process.wait(None if limit == math.inf else limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also where the command left children behind, or we were interrupted
            kill(process, own_group)


def _attempt(stage: Stage, limit: float, log: Path, cwd: Path) -> tuple[str, str, dict]:
    """(status, reason, summary)."""
    try:
        command = stage.command()
        code = execute(command, limit, log, stage.environment, cwd)
        if code is None:
            return TIMED_OUT, f"killed after {round(limit, 1):g} s", {}
        finished = Finished(code, log)
        if (why := finished.skipped()) is not None:
            raise NotRun(why)
        return PASSED, "", stage.judge(finished)
    except NotRun as why:
        return NOT_RUN, str(why), {}
    except Failed as why:
        return FAILED, str(why), {}
    except Exception as error:  # a judge's bug, or output that no judge expected, proves nothing
        return FAILED, f"{type(error).__name__}: {error}", {}


def run_stage(
    stage: Stage, earlier: Mapping[str, str], logs: Path, cwd: Path, monitor=None,
    spare: float = 0.0,
) -> dict:  # fmt: skip
    """Runs one stage, given the status of earlier ones by name and the seconds that they left.

    Returns:
        name, status, seconds, limit_s, reason, summary, and `gpu`: the GPU's state before, after
        and (lowest and highest) meanwhile.
    """
    monitor = monitor or NoMonitor()
    limit = stage.limit + spare
    record = {"name": stage.name, "status": NOT_RUN, "seconds": 0.0, "limit_s": round(limit, 2)}
    broken = [name for name in stage.needs if earlier.get(name) in (FAILED, TIMED_OUT)]
    if broken:
        why = ", ".join(f"{name} {earlier[name]}" for name in broken)
        return record | {"reason": why, "summary": {}, "gpu": {}}
    gpu = {"before": monitor.now()}
    watch = monitor.sampling() if stage.sampled else contextlib.nullcontext({})
    start = time.monotonic()
    with watch as meanwhile:
        status, reason, summary = _attempt(stage, limit, logs / f"{stage.name}.log", cwd)
    seconds = time.monotonic() - start
    gpu |= {"after": monitor.now(), **meanwhile}
    record |= {"status": status, "seconds": round(seconds, 2), "reason": reason}
    return record | {"summary": summary, "gpu": {} if gpu["before"] is None else gpu}


def run(
    stages: Iterable[Stage],
    logs: Path,
    cwd: Path,
    monitor=None,
    report: Callable[[list[dict]], None] = lambda records: None,
) -> list[dict]:
    """Runs all stages, whatever becomes of any; calls `report` with the records after each.

    What a stage leaves of its limit is added to the next one's: all together take no longer.
    """
    records: list[dict] = []
    spare = 0.0
    for stage in stages:
        earlier = {record["name"]: record["status"] for record in records}
        records.append(run_stage(stage, earlier, logs, cwd, monitor, spare))
        spare = max(0.0, records[-1]["limit_s"] - records[-1]["seconds"])
        report(records)
    return records


def succeeded(records: Iterable[dict]) -> bool:
    """Whether no stage failed; one that did not run has not failed."""
    return not any(record["status"] in (FAILED, TIMED_OUT) for record in records)


def width(names: Iterable[str]) -> int:
    """Of a column of stages' names."""
    return max(12, *(len(name) + 2 for name in names))


def table(records: Iterable[dict]) -> str:
    """One line per stage: name, status, seconds, and what it found or why it did not."""
    records = list(records)
    column = width(record["name"] for record in records)
    lines = [f"{'stage':<{column}}{'status':<11}{'s':>6}  "]
    for record in records:
        note = record["reason"] or record["summary"].get("headline", "")
        if len(note) > 150:
            note = note[:147] + "..."
        line = f"{record['name']:<{column}}{record['status']:<11}{record['seconds']:>6.1f}  {note}"
        lines.append(line.rstrip())
    return "\n".join(lines)

"""What the automatic choice knows of a backend by measurement: the shipped table and the verdict.

Of a call it asks, in this order: does the user's own verdict say that a kernel of the backend is
wrong on this device? Then never. Does a row of dispatch.json, which comes with the package, hold
the call? Else, does a class that the user's verdict has won (`shape_classes`)? Else the next
backend of the order is asked, and `composed` at last serves.

A row of dispatch.json counts for one backend, device, compute capability and hash of the kernels'
sources; a verdict for one backend too, so none vouches for another or forbids it.
`python -m bench.dispatch` writes it from bench/results/.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine as machines
from . import shape_classes, verdicts
from .machine import Machine
from .records import Record
from .shape_classes import Call, Class, Kind, Point

TABLE = Path(__file__).with_name("dispatch.json")
SCHEMA = 1
MEASURED = ("cuda", "triton")  # backends that the automatic choice takes by evidence alone
NOTHING = (
    "no passing GPU evidence for this device is part of this version, and you have no verdict of "
    "your own: run "
)
ALONE = (
    "torch.distributed runs several processes, so the verdict of this one does not count; call "
    "lora_kernels.distributed.share_verdicts() on every rank"
)


class Source(NamedTuple):
    """Classes that one place vouches for."""

    name: str  # of the place, for `explain`
    classes: tuple[Class, ...]
    local: bool  # this process alone has it


class Finding(NamedTuple):
    """What was found for a call: whether it was won, and why, in words."""

    won: bool
    why: str


class Evidence:
    """All that is known of a backend on one device.

    Args:
        sources: in the order in which they are asked.
        forbidden: what is wrong on this device, or the empty string.
        ignored: why a verdict that is there does not count, or the empty string.
        backend: of which it is.
    """

    def __init__(
        self, sources: Iterable[Source] = (), forbidden: str = "", ignored: str = "",
        backend: str = "cuda",
    ):  # fmt: skip
        self.sources, self.forbidden, self.ignored = tuple(sources), forbidden, ignored
        self.remedy = verdicts.remedy(backend)
        # by source; scanned by kind of call, of which few classes are
        self._by_kind: list[dict[Kind, list[Class]]] = []
        for source in self.sources:
            kinds: dict[Kind, list[Class]] = {}
            for found in source.classes:
                kinds.setdefault(found.kind, []).append(found)
            self._by_kind.append(kinds)
        self._winners = {c.dtype for s in self.sources for c in s.classes if c.won}

    def steers(self, dtype: torch.dtype) -> bool:
        """Whether some call of this dtype was won; if not, shapes need not be looked at."""
        return not self.forbidden and _name(dtype) in self._winners

    def find(self, dtype: torch.dtype, call: Call | None = None) -> Finding:
        """What speaks for or against the backend in a call; None: in calls of this dtype."""
        if self.forbidden:
            return Finding(False, self.forbidden)
        alone = any(source.local for source in self.sources) and many_ranks()
        return self._look_up(_name(dtype), call, alone)

    def _look_up(self, dtype: str, call: Call | None, alone: bool) -> Finding:
        sources = [
            (source, kinds)
            for source, kinds in zip(self.sources, self._by_kind, strict=True)
            if not (source.local and alone)
        ]
        if call is None:
            if any(c.won and c.dtype == dtype for source, _ in sources for c in source.classes):
                return Finding(False, "it is taken by shape, where it won by measurement")
            return Finding(False, self._nothing(alone))
        lost = ""
        kind = (dtype, "training" if call.training else "forward", call.dropout)
        for source, kinds in sources:
            for found in kinds.get(kind, ()):
                if found.holds(call):
                    if found.won:
                        return Finding(True, _of_winner(found, source))
                    lost = (
                        lost or f"composed is faster: {found.worst}, in {found}, by {source.name}"
                    )
        if lost:
            return Finding(False, lost)
        if not any(c.dtype == dtype for source, _ in sources for c in source.classes):
            return Finding(False, self._nothing(alone))
        why = f"no measured class holds {call} {dtype}"
        return Finding(False, f"{why}; {ALONE}" if alone else why)

    def _nothing(self, alone: bool) -> str:
        if alone:
            return ALONE
        return f"no shipped evidence; {self.ignored}" if self.ignored else NOTHING + self.remedy


def _of_winner(found: Class, source: Source) -> str:
    best = min(point.ratio for point in found.points)
    return (
        f"it takes {best:.3f} to {found.worst.ratio:.3f} of composed's time at the "
        f"{len(found.points)} points measured in {found} (slowest: {found.worst}), by {source.name}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def many_ranks() -> bool:
    """Whether this process is one of several that should choose alike."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


# ---- the shipped table ---------------------------------------------------------------------------


def row_of(found: Class, about: dict[str, Any]) -> dict[str, Any]:
    """A class as dispatch.json has it; `about` is its machine, backend and evidence."""
    points = [[*p[:4], p.ours_ms, p.composed_ms] for p in found.points]
    box = {name: list(getattr(found, name)) for name in shape_classes.EDGES}
    kind = {"dtype": found.dtype, "pass": found.of_pass, "dropout": found.dropout}
    return {**about, **kind, **box, "points": points}


def class_of(row: dict[str, Any]) -> Class:
    """`row_of` undone. What is in a row was right."""
    dropout, dtype, of_pass = row["dropout"], row["dtype"], row["pass"]
    points = tuple(
        Point(m, n, k, r, dropout, dtype, of_pass, ours_ms, composed_ms, right=True)
        for m, n, k, r, ours_ms, composed_ms in row["points"]
    )
    m, n, k, r = (tuple(row[name]) for name in shape_classes.EDGES)
    return Class(dtype, of_pass, dropout, m, n, k, r, points)


def rows_for(
    machine: Machine, rows: Iterable[dict[str, Any]], backend: str
) -> list[dict[str, Any]]:
    """The rows of a backend that count on this machine."""
    here = {key: getattr(machine, key) for key in ("device", "capability", "sources")}
    here["backend"] = backend
    return [row for row in rows if all(row[key] == value for key, value in here.items())]


def shipped(machine: Machine, table: dict[str, Any], backend: str) -> list[Source]:
    """What a table of dispatch.json's format vouches for of a backend on this machine."""
    by_place: dict[str, list[Class]] = {}
    for row in rows_for(machine, table["rows"] + table["slower"], backend):
        place = row["evidence"]
        name = f"shipped evidence {place['folder']} of commit {place['commit'][:12]}"
        name += f" (torch {row['torch']}, CUDA {row['cuda']})"
        by_place.setdefault(name, []).append(class_of(row))
    return [Source(name, tuple(found), local=False) for name, found in by_place.items()]


# ---- the verdict ---------------------------------------------------------------------------------


def of_record(record: Record, name: str, *, local: bool) -> tuple[Source, str]:
    """(what a record vouches for, what it forbids)."""
    wrong = record.wrong()
    where = f"{name} of {record.date}"
    forbidden = (
        f"a kernel is wrong on this device: {', '.join(wrong)}, says {where}; reinstall, then run "
        f"{verdicts.remedy(record.backend)}"
        if wrong
        else ""
    )
    return Source(where, tuple(shape_classes.classes(record.points)), local), forbidden


def evaluate(
    machine: Machine, table: dict[str, Any], verdict: Record | None = None, shared: bool = False,
    ignored: str = "", backend: str = "cuda",
) -> Evidence:  # fmt: skip
    """The evidence there is for a backend on a machine.

    Args:
        machine: with the hash of this backend's kernels.
        table: as dispatch.json.
        verdict: the user's own, or if `shared` rank 0's; None: there is none.
        ignored: why one that is there does not count.
    """
    if not machine.sources:
        library = "the library says no hash of its kernels: it was built without them"
        why = "Triton is not installed" if backend == "triton" else library
        return Evidence(ignored=why, backend=backend)
    sources = shipped(machine, table, backend)
    if verdict is None:
        return Evidence(sources, ignored=ignored, backend=backend)
    own = "" if shared else f"your verdict {verdicts.path_of(machine, backend)}"
    name = own or "rank 0's verdict"
    source, forbidden = of_record(verdict, name, local=not shared)
    return Evidence([*sources, source], forbidden, backend=backend)


# ---- of this process -----------------------------------------------------------------------------

_shared: dict[str, Record] = {}  # by backend
_listeners: list[Callable[[], None]] = []


@functools.cache
def evidence(device: torch.device, backend: str = "cuda") -> Evidence:
    """Of a backend on a device of this process; read once, until `reload`."""
    here = machines.of(device, backend)
    if not here.is_gpu:
        return Evidence(ignored="a verdict of a CPU steers nothing", backend=backend)
    table = load_table()
    shared = _shared.get(backend)
    if shared is not None and shared.machine == here:
        return evaluate(here, table, shared, shared=True, backend=backend)
    verdict, ignored = verdicts.load(here, backend)
    if verdict is not None and verdict.backend != backend:
        ignored = f"your verdict is of backend {verdict.backend!r}"
        verdict = None
    found = evaluate(here, table, verdict, ignored=ignored, backend=backend)
    if found.forbidden:
        about = f"{backend} forbidden on {here.device}"
        verdicts.warn(about, f"backend {backend!r} is out: {found.forbidden}")
    return found


@functools.cache
def load_table() -> dict[str, Any]:
    """dispatch.json of this package."""
    table = json.loads(TABLE.read_text())
    if table["schema"] != SCHEMA:
        raise RuntimeError(f"{TABLE}: schema {table['schema']}, expected {SCHEMA}; reinstall")
    return table


def use_shared(*found: Record) -> None:
    """Makes rank 0's verdicts, already validated, those of this process, and no others."""
    _shared.clear()
    _shared.update((record.backend, record) for record in found)
    reload()


def reload() -> None:
    """Forgets what was read and chosen: a table or a verdict has changed."""
    load_table.cache_clear()
    evidence.cache_clear()
    for listener in _listeners:
        listener()


def on_reload(listener: Callable[[], None]) -> None:
    _listeners.append(listener)

"""What `selfcheck` found on one device: the one format of evidence and of verdicts, checked.

    {"schema": 1, "date": ..., "backend": "cuda", "machine": {a string for each of Machine},
     "checks": [{"op", "form", "dtype", "dropout", "shape": [M, N, K, r], "status", "usage",
                 "note"}, ...],
     "points": [{"m", "n", "k", "r", "dropout", "dtype", "pass", "ours_ms", "composed_ms",
                 "right"}, ...]}

`usage` is error / bound of C1 (`criterion`), null where there is no such number.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .machine import Machine
from .shape_classes import PASSES, Point

SCHEMA = 1
RIGHT, WRONG, NOT_SERVED = "right", "wrong", "not served"
DTYPES = ("float16", "bfloat16", "float32")
MAX_ENTRIES = 10_000  # of checks, and of points
MAX_TEXT = 400  # characters
MAX_SIZE = 2**31  # of M, N, K and r
MAX_MS = 1e7


class Check(NamedTuple):
    """One call of one operator, compared with float64."""

    op: str
    form: str  # of forward_as and backward_as
    dtype: str
    dropout: bool
    shape: tuple[int, ...]  # M, N, K, r
    status: str
    usage: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.op} {self.form}".strip()


class Record(NamedTuple):
    """All that one device has shown."""

    date: str
    backend: str
    machine: Machine
    checks: tuple[Check, ...]
    points: tuple[Point, ...]

    def wrong(self) -> list[str]:
        """What is not right, by name; nothing if all is."""
        names = [c.name for c in self.checks if c.status == WRONG]
        names += ["fused_lora_linear" for p in self.points if not p.right]
        return list(dict.fromkeys(names))

    def joined(self, older: Record) -> Record:
        """This one, with what `older`, of the same machine and backend, has beyond it."""
        checks = {c[:5]: c for c in (*older.checks, *self.checks)}
        points = {p[:7]: p for p in (*older.points, *self.points)}
        return self._replace(checks=tuple(checks.values()), points=tuple(points.values()))


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def dump(record: Record) -> dict[str, Any]:
    """JSON's view; `parse` is its inverse."""
    return {
        "schema": SCHEMA,
        "date": record.date,
        "backend": record.backend,
        "machine": record.machine._asdict(),
        "checks": [check._asdict() | {"shape": list(check.shape)} for check in record.checks],
        "points": [_rename(point._asdict(), "of_pass", "pass") for point in record.points],
    }


def parse(found: object) -> Record:
    """The record that JSON of unknown origin holds.

    Raises:
        ValueError: what is not as it must be. Nothing else, whatever `found` is.
    """
    top = _object(found, "the record", ("schema", "date", "backend", "machine", "checks", "points"))
    if top["schema"] != SCHEMA:
        raise ValueError(f"schema is {str(top['schema'])[:20]}, expected {SCHEMA}")
    machine = _object(top["machine"], "machine", Machine._fields)
    date = _text(top["date"], "date")
    datetime.datetime.fromisoformat(date)  # raises ValueError itself
    return Record(
        date,
        _text(top["backend"], "backend"),
        Machine(**{name: _text(value, name) for name, value in machine.items()}),
        tuple(_check(entry) for entry in _list(top["checks"], "checks")),
        tuple(_point(entry) for entry in _list(top["points"], "points")),
    )


def _check(entry: object) -> Check:
    found = _object(entry, "a check", Check._fields)
    shape = tuple(_size(size, "shape") for size in _list(found["shape"], "shape"))
    if len(shape) != 4:
        raise ValueError(f"shape has {len(shape)} sizes, expected M, N, K and r")
    usage = found["usage"]
    return Check(
        _text(found["op"], "op"),
        _text(found["form"], "form"),
        _one_of(found["dtype"], "dtype", DTYPES),
        _flag(found["dropout"], "dropout"),
        shape,
        _one_of(found["status"], "status", (RIGHT, WRONG, NOT_SERVED)),
        None if usage is None else _number(usage, "usage", lambda value: value >= 0),
        _text(found["note"], "note"),
    )


def _point(entry: object) -> Point:
    names = tuple("pass" if name == "of_pass" else name for name in Point._fields)
    found = _object(entry, "a point", names)

    def milliseconds(name: str) -> float:
        return _number(found[name], name, lambda value: 0 < value <= MAX_MS)

    m, n, k, r = (_size(found[name], name) for name in "mnkr")
    return Point(
        m,
        n,
        k,
        r,
        _flag(found["dropout"], "dropout"),
        _one_of(found["dtype"], "dtype", DTYPES),
        _one_of(found["pass"], "pass", PASSES),
        milliseconds("ours_ms"),
        milliseconds("composed_ms"),
        _flag(found["right"], "right"),
    )


def _rename(found: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in found.items()}


def _object(found: object, what: str, names: Iterable[str]) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) != set(names):
        raise ValueError(f"{what} must be an object with the keys {', '.join(names)}")
    return found


def _list(found: object, what: str) -> list[object]:
    if not isinstance(found, list) or len(found) > MAX_ENTRIES:
        raise ValueError(f"{what} must be a list of at most {MAX_ENTRIES} entries")
    return found


def _text(found: object, what: str) -> str:
    if not isinstance(found, str) or len(found) > MAX_TEXT or not found.isprintable():
        raise ValueError(f"{what} must be a line of at most {MAX_TEXT} characters")
    return found


def _one_of(found: object, what: str, names: Iterable[str]) -> str:
    if not isinstance(found, str) or found not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}")
    return found


def _flag(found: object, what: str) -> bool:
    if not isinstance(found, bool):
        raise ValueError(f"{what} must be true or false")
    return found


def _number(found: object, what: str, accept: Callable[[float], bool]) -> float:
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    # compared before it is made a float, which a long integer would not fit
    if not is_number or not math.isfinite(_clipped(found)) or not accept(_clipped(found)):
        raise ValueError(f"{what} must be a finite number in its range")
    return float(_clipped(found))


def _clipped(found: Any) -> float:
    return math.inf if isinstance(found, int) and abs(found) > 1e300 else found


def _size(found: object, what: str) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= MAX_SIZE:
        raise ValueError(f"{what} must hold integers from 1 to {MAX_SIZE}")
    return found

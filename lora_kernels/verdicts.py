"""The user's verdicts: what `selfcheck` found on this machine, in files that are not trusted.

A verdict is JSON, {"hmac": ..., "verdict": a record}, in the user's cache folder, one file a
device and backend. It is signed by HMAC-SHA256 with a random key beside it, so a file that was
edited, or copied from another machine, is known for what it is; whoever can read the key, which is
the user alone, can sign. Folder, key and file must be the user's own and closed to other writers. A
file that is anything else is ignored, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine as machines
from . import records
from .machine import Machine
from .records import Record

ENV = "LORA_KERNELS_CACHE"
REMEDY = "python -m lora_kernels selfcheck"
OF_DEVICE = ("cuda", "cpu")  # backends that a device's type names
MAX_BYTES = 4 << 20
KEY_BYTES = 32
_OPEN = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
)
_warned: set[str] = set()


class VerdictWarning(UserWarning):
    """A verdict was there and is not used."""


class Untrusted(Exception):
    """What is wrong with a file, in words that continue "is ignored:"."""


def folder() -> Path:
    """LORA_KERNELS_CACHE, or lora_kernels in the system's place for a user's caches.

    Raises:
        Untrusted: the user has no home.
    """
    if given := os.environ.get(ENV):
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says its specification
        return Path(base, "lora_kernels")
    try:
        home = Path.home()
    except RuntimeError as error:
        raise Untrusted(f"there is no home folder ({error}); set {ENV}") from None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local", "lora_kernels")
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lora_kernels"


def remedy(backend: str) -> str:
    """The command that gives a verdict of this backend."""
    return REMEDY if backend in OF_DEVICE else f"{REMEDY} --backend {backend}"


def path_of(machine: Machine, backend: str = "cuda") -> Path:
    """The file of a backend on a device, whatever versions and sources are."""
    name = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")[:80]
    capability = re.sub(r"[^a-zA-Z0-9]+", "-", machine.capability)
    suffix = "" if backend in OF_DEVICE else f"-{backend}"
    return folder() / f"verdict-{name}-{capability}{suffix}.json"


# ---- reading -------------------------------------------------------------------------------------


def load(machine: Machine, backend: str = "cuda") -> tuple[Record | None, str]:
    """(the verdict of a backend here, "") or (None, why there is none: "" if no file is there).

    Warns with VerdictWarning, once in a process for a file that is there and is not used.
    """
    where = "the verdict"
    try:
        path = path_of(machine, backend)
        where = str(path)
        return _read(path, machine), ""
    except FileNotFoundError:
        return None, ""
    except Untrusted as why:
        reason = f"{where} is ignored: {why}; the remedy is {remedy(backend)}"
    except OSError as error:
        reason = f"{where} is ignored: {error.strerror}; remove it, then {remedy(backend)}"
    warn(where, reason)
    return None, reason


def warn(about: str, text: str) -> None:
    """VerdictWarning, once in a process for each thing that it is about."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(f"lora_kernels: {text}", VerdictWarning, stacklevel=2)


def _read(path: Path, machine: Machine) -> Record:
    os.lstat(path)  # no file, no verdict: then the folder and the key do not matter
    _check_folder(path.parent)
    content = _json(_bytes(path, MAX_BYTES, 0o022))
    if not isinstance(content, dict) or set(content) != {"hmac", "verdict"}:
        raise Untrusted("it is no verdict")
    try:
        key = _bytes(path.parent / "key", KEY_BYTES, 0o077)
    except FileNotFoundError:
        raise Untrusted("the key that signed it is gone") from None
    if len(key) != KEY_BYTES:
        raise Untrusted(f"the key has {len(key)} bytes, expected {KEY_BYTES}")
    signature = content["hmac"]
    if not isinstance(signature, str) or not hmac.compare_digest(
        signature.encode(errors="replace"), _signature(key, content["verdict"]).encode()
    ):
        raise Untrusted("its signature is wrong: it was edited, or comes from another machine")
    try:
        found = records.parse(content["verdict"])
    except ValueError as error:
        raise Untrusted(f"it is malformed: {error}") from None
    if differ := machines.differences(found.machine, machine):
        raise Untrusted(f"it is stale: it is of {'; '.join(differ)}")
    return found


def _bytes(path: Path, limit: int, forbidden: int) -> bytes:
    """The content of an ordinary file of this user without these mode bits."""
    descriptor = os.open(path, _OPEN)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Untrusted(f"{path.name} is no ordinary file")
        _check_owner(found, path.name, forbidden)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise Untrusted(f"{path.name} has more than {limit} bytes")
    return content


def _check_folder(path: Path) -> None:
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise Untrusted(f"{path} is no folder")
    _check_owner(found, str(path), 0o022)


def _check_owner(found: os.stat_result, name: str, forbidden: int) -> None:
    if not hasattr(os, "getuid"):
        return  # Windows: the user's folders are closed to other users by inheritance
    if found.st_uid != os.getuid():
        raise Untrusted(f"{name} belongs to another user")
    if found.st_mode & forbidden:
        what = "written" if forbidden == 0o022 else "read"
        raise Untrusted(f"{name} can be {what} by other users; run chmod go-rwx on it")


def _json(content: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise Untrusted("it is not JSON: truncated or corrupt") from None


def _signature(key: bytes, verdict: object) -> str:
    try:
        text = json.dumps(verdict, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise Untrusted("it is malformed") from None
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


# ---- writing -------------------------------------------------------------------------------------


def save(record: Record) -> Path:
    """Stores a verdict, with what a valid one of the same machine had beyond it.

    Raises:
        Untrusted: the folder is not the user's own. OSError: it cannot be written.
    """
    path = path_of(record.machine, record.backend)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(path.parent)
    with _locked(path.parent):
        key = _key(path.parent)
        with contextlib.suppress(Untrusted, OSError):
            older = _read(path, record.machine)
            record = record.joined(older) if older.backend == record.backend else record
        verdict = records.dump(record)
        text = json.dumps({"hmac": _signature(key, verdict), "verdict": verdict}, allow_nan=False)
        _replace(path, text.encode())
    return path


def clear(machine: Machine, backend: str = "cuda") -> Path | None:
    """Removes the verdict of a backend on a machine; where it was, or None if there was none."""
    path = path_of(machine, backend)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    return path


def _key(where: Path) -> bytes:
    """The key, made when there is none or when what is there cannot be trusted."""
    path = where / "key"
    with contextlib.suppress(Untrusted, OSError):
        if len(key := _bytes(path, KEY_BYTES, 0o077)) == KEY_BYTES:
            return key
    key = secrets.token_bytes(KEY_BYTES)
    _replace(path, key)
    return key


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _locked(where: Path) -> Iterator[None]:
    """One writer at a time, where the system has such locks; elsewhere the last one wins whole."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(where / "lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

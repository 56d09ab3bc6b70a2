"""Compiles the emulated kernels: `tests/emulator/*.cpp` around `csrc`, one object a source.

Objects are kept under build/emulator by the hash of what they were made of, so a change of one
kernel compiles one file, and workers of pytest-xdist share what either has compiled.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from includes import closure

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"
EMULATOR = ROOT / "tests" / "emulator"
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
MUTANT_FLAGS = ["-O0", *(f for f in FLAGS[1:] if f not in ("-Wall", "-Werror"))]
MODULE = "emulated"
KEPT_SECONDS = 24 * 3600  # since the last use


def compiler() -> str | None:
    return shutil.which("c++")


def sources(root: Path = ROOT) -> list[Path]:
    return sorted((root / "tests/emulator").glob("*.cpp"))


def _folders(root: Path) -> list[Path]:
    folders = ("csrc", "csrc/cuda", "tests", "tests/emulator", "tests/emulator/runtime")
    return [root / folder for folder in folders]


def _digest(parts: list[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:20]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _compile(source: Path, root: Path, flags: list[str], target: Path) -> None:
    import pybind11

    folders = [*_folders(root), Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    include = [f"-I{folder}" for folder in folders]
    half_done = target.with_suffix(".tmp.o")
    _run([str(compiler()), *flags, *include, "-c", str(source), "-o", str(half_done)])
    half_done.rename(target)


def _object(source: Path) -> Path:
    """The object of one source of the emulator, from the cache if it is there."""
    parts = [" ".join(FLAGS).encode(), *map(Path.read_bytes, closure(source, _folders(ROOT)))]
    target = CACHE / f"{source.stem}.{_digest(parts)}.o"
    with _locked(target):
        if not target.exists():
            _compile(source, ROOT, FLAGS, target)
    target.touch()
    return target


def _link(objects: list[Path], folder: Path) -> Path:
    target = folder / f"{MODULE}.so"
    with _locked(target):
        if not target.exists():
            half_done = target.with_suffix(".tmp.so")
            _run([str(compiler()), "-shared", *map(str, objects), "-o", str(half_done)])
            half_done.rename(target)
    target.touch()
    return target


def _forget_old() -> None:
    for path in CACHE.rglob("*"):
        if path.is_file() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def load(library: Path, name: str = MODULE) -> ModuleType:
    """The extension module `name` of a library that is on no path."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> Path:
    """The library of the emulated kernels; what did not change comes from the cache."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_object, sources()))
    library = _link(objects, CACHE / _digest([str(o).encode() for o in objects]))
    _forget_old()
    return library


def build_mutant(tree: Path, changed: tuple[str, ...]) -> Path:
    """The library, in `tree`, of a copy of csrc and tests/emulator with something changed.

    Args:
        tree: where the copy is.
        changed: stems of the sources that are compiled from it; all others come from here.
    """
    targets = {path: tree / f"{path.stem}.o" for path in sources(tree) if path.stem in changed}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: _compile(path, tree, MUTANT_FLAGS, targets[path]), targets))
        objects = [_object(path) for path in sources() if path.stem not in changed]
    return _link([*targets.values(), *objects], tree)

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"
EMULATOR = ROOT / "tests" / "emulator"
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
MODULE = "emulated"


def compiler() -> str | None:
    return shutil.which("c++")


def headers(csrc: Path) -> list[Path]:
    own = [p for p in EMULATOR.glob("*.h")]
    return sorted([*own, *csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh")])


def sources() -> list[Path]:
    return sorted(EMULATOR.glob("*.cpp"))


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


def compile_object(source: Path, csrc: Path) -> Path:
    """The object of one source, whose `cuda/...` includes are taken from `csrc`."""
    import pybind11

    included = [*headers(csrc), *csrc.glob("cuda/*.cpp")]
    parts = [" ".join(FLAGS).encode(), source.read_bytes(), *(p.read_bytes() for p in included)]
    target = CACHE / f"{source.stem}.{_digest(parts)}.o"
    with _locked(target):
        if not target.exists():
            folders = [csrc, csrc / "cuda", ROOT / "tests", EMULATOR]
            folders += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
            include = [f"-I{folder}" for folder in folders]
            half_done = target.with_suffix(".tmp.o")
            _run([str(compiler()), *FLAGS, *include, "-c", str(source), "-o", str(half_done)])
            half_done.rename(target)
    return target


def link(objects: list[Path]) -> Path:
    """The shared library of these objects; its folder is named after them."""
    target = CACHE / _digest([str(o).encode() for o in objects]) / f"{MODULE}.so"
    with _locked(target):
        if not target.exists():
            half_done = target.with_suffix(".tmp.so")
            _run([str(compiler()), "-shared", *map(str, objects), "-o", str(half_done)])
            half_done.rename(target)
    return target


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(csrc: Path = ROOT / "csrc", changed: tuple[str, ...] = ()) -> Path:
    """The emulated kernels of `csrc`.

    Args:
        csrc: the kernels' sources, possibly a copy with a mistake in it.
        changed: stems of the emulator's sources that are compiled against that copy; all others
            are compiled against the repository's own, and so come from the cache.
    """
    with ThreadPoolExecutor(2) as pool:
        folders = [csrc if s.stem in changed else ROOT / "csrc" for s in sources()]
        objects = list(pool.map(compile_object, sources(), folders))
    return link(objects)

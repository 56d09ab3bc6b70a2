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
MUTANT_FLAGS = ["-O1", *(f for f in FLAGS[1:] if f not in ("-Wall", "-Werror"))]
MODULE = "emulated"


def compiler() -> str | None:
    return shutil.which("c++")


def sources(root: Path = ROOT) -> list[Path]:
    return sorted((root / "tests/emulator").glob("*.cpp"))


def _included(root: Path) -> list[Path]:
    places = ("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh", "csrc/cuda/*.cpp")
    own = ("tests/emulator/*.h", "tests/emulator/*.cuh")
    return sorted(path for place in places + own for path in root.glob(place))


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


def compile_object(source: Path, root: Path, flags: list[str]) -> Path:
    """The object of one source of the emulator, whose includes are those of the tree `root`."""
    import pybind11

    parts = [" ".join(flags).encode(), *(p.read_bytes() for p in [source, *_included(root)])]
    target = CACHE / f"{source.stem}.{_digest(parts)}.o"
    with _locked(target):
        if not target.exists():
            folders = [root / f for f in ("csrc", "csrc/cuda", "tests", "tests/emulator")]
            folders += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
            include = [f"-I{folder}" for folder in folders]
            half_done = target.with_suffix(".tmp.o")
            _run([str(compiler()), *flags, *include, "-c", str(source), "-o", str(half_done)])
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


def build(mutant: Path | None = None, changed: tuple[str, ...] = ()) -> Path:
    """The library of the emulated kernels.

    Args:
        mutant: a tree with a copy of csrc and tests/emulator, some of it changed.
        changed: stems of the sources that are compiled from that tree; all others come from this
            one, and so from the cache.
    """
    from_mutant = {path.stem: path for path in sources(mutant)} if mutant else {}

    def one(source: Path) -> Path:
        if mutant and source.stem in changed:
            return compile_object(from_mutant[source.stem], mutant, MUTANT_FLAGS)
        return compile_object(source, ROOT, FLAGS)

    with ThreadPoolExecutor(2) as pool:
        return link(list(pool.map(one, sources())))

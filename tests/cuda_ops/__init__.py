"""The CUDA operators, compiled by g++ to run on CPU tensors: `load()` registers them.

csrc/torch, the plans and `device_target` are those of the package that is imported. A launch is
done by the CPU kernels, and what was asked of the device stands in a journal.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from emulator.build import ROOT, _digest, _locked, _run, compiler
from includes import closure
from torch.utils import cpp_extension

import lora_kernels
from lora_kernels.schemas import SCHEMAS

HERE = Path(__file__).parent
RUNTIME = HERE.parent / "emulator" / "runtime"
CACHE = ROOT / "build" / "cuda_ops"
NAMESPACE = "cuda_ops"
FLAGS = [
    "-O0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-DLK_HUB",
    f"-DTORCH_EXTENSION_NAME={NAMESPACE}", "-DLK_SM90A",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # setup.py's TORCH_ABI
]  # fmt: skip


def _object(source: Path, root: Path) -> str:
    """Of one source; a changed copy of csrc keeps its own beside it."""
    folders = [root, HERE, RUNTIME]
    parts = [" ".join(FLAGS).encode(), *map(Path.read_bytes, closure(source, folders))]
    parts.append((RUNTIME / "cuda_runtime_api.h").read_bytes())  # which csrc names in <>
    name = f"{source.stem}.{_digest(parts)}.o"
    target = CACHE / name
    if root != ROOT and not target.exists():
        target = root / name
    with _locked(target):
        if not target.exists():
            include = [*(f"-I{f}" for f in folders)]
            include += [f"-isystem{f}" for f in cpp_extension.include_paths()]
            half_done = target.with_suffix(".tmp.o")
            _run([str(compiler()), *FLAGS, *include, "-c", str(source), "-o", str(half_done)])
            half_done.rename(target)
    return str(target)


def _build(root: Path) -> Path:
    sources = [HERE / "operators.cpp", HERE / "launches.cpp", root / "csrc/cuda/launch.cpp"]
    sources += sorted((root / "csrc/cuda").glob("*_plan.cpp"))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(source, root), sources))
    library = (CACHE if root == ROOT else root) / f"{_digest([o.encode() for o in objects])}.so"
    with _locked(library):
        if not library.exists():
            half_done = library.with_suffix(".tmp.so")
            folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
            torchs = [*folders, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
            _run([str(compiler()), "-shared", *objects, *torchs, "-o", str(half_done)])
            half_done.rename(library)
    return library


class Device:
    """What stands for the GPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.read_journal.restype = ctypes.c_char_p
        self.next_launch_fails = self._library.next_launch_fails
        self.use = self._library.use_device  # (10 * major + minor, multiprocessors)

    def journal(self) -> list[str]:
        """What was asked of it since the last time."""
        return self._library.read_journal().decode().splitlines()


@functools.cache
def load() -> Device:
    """Registers torch.ops.cuda_ops, on tensors of any device."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    device = Device(_build(Path(lora_kernels.__file__).parents[1]))
    device.definitions = library  # they live as long
    return device

"""Builds the CPU part of lora_kernels._C from a copy of csrc: quickly, for planted bugs.

Objects of files that the bug does not reach are kept, by the hash of what they were made of.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from emulator.build import ROOT, _digest, _locked, _run, compiler
from includes import closure
from torch.utils import cpp_extension

CACHE = ROOT / "build" / "cpu_library"
FLAGS = [
    "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTORCH_EXTENSION_NAME=_C",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # setup.py's TORCH_ABI
]  # fmt: skip


def _sources(csrc: Path) -> list[Path]:
    cpu = sorted([*csrc.glob("torch/cpu*.cpp"), *csrc.glob("cpu/*.cpp")])
    return [csrc / "torch/module.cpp", *cpu]


def _name(source: Path) -> str:
    parts = [" ".join(FLAGS).encode(), *map(Path.read_bytes, closure(source, []))]
    return f"{source.stem}.{_digest(parts)}.o"


def _compile(source: Path, target: Path) -> None:
    include = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    include.append(f"-I{sysconfig.get_path('include')}")
    half_done = target.with_suffix(".tmp.o")
    _run([str(compiler()), *FLAGS, *include, "-c", str(source), "-o", str(half_done)])
    half_done.rename(target)


def build(tree: Path, library: Path) -> None:
    """`library`, of a tree that holds a copy of csrc with something changed."""
    objects = []
    for source, unchanged in zip(_sources(tree / "csrc"), _sources(ROOT / "csrc"), strict=True):
        name = _name(source)
        found = (CACHE if name == _name(unchanged) else tree) / name
        with _locked(found):
            if not found.exists():
                _compile(source, found)
        objects.append(str(found))
    folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    torch = [*folders, "-Wl,--no-as-needed,-ltorch,--as-needed"]
    _run([str(compiler()), "-shared", *objects, *torch, "-o", str(library)])

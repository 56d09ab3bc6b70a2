"""Which files a C++ source is made of: what to hash before a compiled object is used again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def closure(source: Path, folders: Sequence[Path]) -> list[Path]:
    """The source and all that it includes by quotes, under conditions too, sorted.

    A name is looked up beside the file that has it, then in `folders`, as compilers do.
    """
    found, waiting = set(), [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            there = (folder / name for folder in (path.parent, *folders))
            waiting += [p.resolve() for p in there if p.is_file()][:1]
    return sorted(found)

"""Tables of the pages in docs/, for tests that recompute them."""

from __future__ import annotations

import itertools
from pathlib import Path


def table_of(page: Path, heading: str) -> list[list[str]]:
    """Rows of the page's first table behind these words, without its header."""
    text = page.read_text()
    lines = text[text.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def code_of(page: Path) -> str:
    """Every Python block of the page, one after the other."""
    blocks = page.read_text().split("```python\n")[1:]
    return "\n".join(block.split("```")[0] for block in blocks)

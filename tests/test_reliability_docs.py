"""docs/reliability.md: its table of faults and the tests are the same ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pages import table_of

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
FAULTS = 44


def named() -> dict[tuple[str, str], int]:
    """(file, test) -> number of the row that names it."""
    found = {}
    for number, _, _, tests in table_of(PAGE, "## Faults"):
        for link in tests.split("; "):
            text, path, names = re.fullmatch(r"\[(.+)\]\(\.\./tests/(.+)\): (.+)", link).groups()
            assert text == path
            for name in names.split(", "):
                assert (path, name) not in found
                found[path, name.strip("`")] = int(number)
    return found


def written() -> dict[tuple[str, str], int]:
    """The same of the tests that there are."""
    texts = {path.name: path.read_text() for path in TESTS.glob("test_*.py")}
    return {
        (file, node.name): int(number[1])
        for file, text in texts.items()
        if "test_fault_" in text
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and (number := re.match(r"test_fault_(\d\d)_", node.name))
    }


def test_every_fault_has_one_row_with_a_test():
    numbers = [int(row[0]) for row in table_of(PAGE, "## Faults")]
    assert numbers == list(range(1, FAULTS + 1)) and set(named().values()) == set(numbers)


def test_the_table_names_the_tests_that_there_are():
    assert named() == written()

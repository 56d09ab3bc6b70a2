"""How the fine-tuning examples show their progress, their table and what went wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import transformers
from data import DataError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Run = Callable[[argparse.Namespace, Progress], tuple[list[tuple[str, str]], list[str]]]


def show(title: str, run: Run, args: argparse.Namespace) -> int:
    """Prints the rows and complaints of run(args, progress); the exit code."""
    console = Console()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with Progress(console=console, transient=True) as progress:
            rows, complaints = run(args, progress)
    except DataError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for complaint in complaints:
        console.print(f"FAILED: {complaint}", style="red", markup=False)
    return 1 if complaints else 0

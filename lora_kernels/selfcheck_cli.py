"""`python -m lora_kernels selfcheck`: checks every kernel on this machine, times them, and stores a
verdict that the automatic choice follows.

Exit codes: 0 all is right, 1 a kernel is wrong, 2 it cannot run, or its verdict be stored, here.
With rich there are tables and a progress bar, without it plain lines.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import machine as machines
from . import records, selfcheck, shape_classes, verdicts
from .records import NOT_SERVED, RIGHT, WRONG, Record
from .selfcheck import CannotRun, Shape

OK, KERNEL_WRONG, NO_RUN = 0, 1, 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Table = tuple[str, Sequence[str], list[list[str]]]  # title, headers, rows

# ---- arguments -----------------------------------------------------------------------------------


def _shapes(text: str) -> list[Shape]:
    if text in selfcheck.SHAPES:
        return selfcheck.SHAPES[text]
    found = []
    for item in text.split(","):
        sizes = item.strip().lower().split("x")
        bad = [s for s in sizes if not s.isdecimal() or not 0 < int(s) <= records.MAX_SIZE]
        if len(sizes) != 4 or bad:
            raise argparse.ArgumentTypeError(
                f"got {item!r}; expected {', '.join(selfcheck.SHAPES)}, or MxNxKxr such as "
                "8192x4096x4096x16"
            )
        m, n, k, r = map(int, sizes)
        found.append((m, n, k, r))
    return found


def _dtypes(text: str) -> list[torch.dtype]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(
            f"unknown dtype {', '.join(unknown)}; expected some of {', '.join(DTYPES)}"
        )
    return [DTYPES[name] for name in names]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected cpu, cuda or cuda:N")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels selfcheck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", type=_shapes, metavar="SET|MxNxKxr[,...]",
        help="what is timed: small, few, default, or shapes of your own; default: default on a "
        "GPU, small on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=_device, default=torch.device("cuda"), help="default: cuda"
    )
    parser.add_argument(
        "--backend", choices=list(selfcheck.DTYPES), help="default: that of the device's type"
    )
    parser.add_argument(
        "--dtype", type=_dtypes, metavar="DTYPE[,DTYPE]",
        help=f"of {', '.join(DTYPES)}; default: bf16,fp16 on a GPU, of triton fp32 too; fp32 on a "
        "CPU",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true",
        help="say what would be checked, timed and stored, and do nothing of it",
    )  # fmt: skip
    parser.add_argument("--clear", action="store_true", help="remove this verdict")
    parser.add_argument("--no-store", action="store_true", help="leave the stored verdict alone")
    parser.add_argument("--no-operators", action="store_true", help="the timed points alone")
    parser.add_argument(
        "--seconds", type=float, help="begin no further point after so many; default: no limit"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was found there too")
    return parser


# ---- printing ------------------------------------------------------------------------------------


class Plain:
    """Lines of text; progress by tenths."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def table(self, table: Table) -> None:
        title, headers, rows = table
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        print(f"\n{title}")
        for row in (headers, *rows):
            print("  ".join(map(str.ljust, row, widths)).rstrip(), flush=True)

    @contextlib.contextmanager
    def progress(self, backend: str) -> Iterator[selfcheck.Progress]:
        tenth = -1

        def told(done: int, total: int, what: str) -> None:
            nonlocal tenth
            if 10 * done // max(total, 1) != tenth:
                tenth = 10 * done // max(total, 1)
                print(f"{backend}, {done} of {total}: {what}", flush=True)

        yield told


class Rich(Plain):
    """Tables and a progress bar by rich."""

    def __init__(self):
        from rich.console import Console

        self.console = Console()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        from rich import box
        from rich.table import Table as RichTable

        title, headers, rows = table
        found = RichTable(
            *headers,
            title=title,
            title_justify="left",
            box=box.SIMPLE,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in found.columns[:-1]:  # the last is a note
            column.no_wrap = True
        styles = {WRONG: "bold red", NOT_SERVED: "dim"}
        for row in rows:
            found.add_row(*row, style=next((styles[c] for c in row if c in styles), ""))
        self.console.print(found)

    @contextlib.contextmanager
    def progress(self, backend: str) -> Iterator[selfcheck.Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(backend)

            def told(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=f"{backend}: {what}")

            yield told


def _printer() -> Plain:
    try:
        return Rich()
    except ImportError:
        return Plain()


def _operators(record: Record) -> Table:
    """One line an operator and form: how many calls were right, and how much of C1 they used."""
    rows = []
    for name in dict.fromkeys(check.name for check in record.checks):
        found = [check for check in record.checks if check.name == name]
        counts = Counter(check.status for check in found)
        status = next(s for s in (WRONG, RIGHT, NOT_SERVED) if counts[s])
        used = [c.usage for c in found if c.status == status and c.usage is not None]
        notes = [c.note for c in found if c.status == status and c.note]
        if status == RIGHT:
            notes = [f"{counts[NOT_SERVED]} not served"] if counts[NOT_SERVED] else []
        worst = f"{max(used):.2f}" if used else "-"
        rows.append([name, status, str(counts[status]), worst, notes[0] if notes else ""])
    title = f"operators of {record.backend} against float64"
    return (title, ("op", "status", "calls", "of its bound", "note"), rows)


def _points(record: Record) -> Table:
    rows = []
    for p in record.points:
        verdict = WRONG if not p.right else record.backend if p.won else "composed"
        shape = f"{p.m}x{p.n}x{p.k}x{p.r}"
        times = [f"{p.ours_ms:.4g}", f"{p.composed_ms:.4g}", f"{p.ratio:.3f}"]
        dtype = next(name for name, full in DTYPES.items() if str(full) == f"torch.{p.dtype}")
        rows.append(
            [shape, dtype, "yes" if p.dropout else "no", p.of_pass, *times, verdict]
        )  # fmt: skip
    headers = ("MxNxKxr", "dtype", "drop", "pass", f"{record.backend} ms", "composed ms")
    return (
        f"fused_lora_linear, medians: {record.backend} against composed",
        (*headers, "ratio", "faster"),
        rows,
    )


def _conclusion(record: Record, say: Callable[[str], None]) -> None:
    if wrong := record.wrong():
        say(f"\nWRONG RESULTS: {', '.join(wrong)}. Do not use backend {record.backend!r} here.")
        again = verdicts.remedy(record.backend)
        say(f"Reinstall, run {again} again, and if it stays report the output.")
    classes = shape_classes.classes(record.points)
    won = [found for found in classes if found.won]
    if not record.machine.is_gpu:
        say("\nA verdict of a CPU steers nothing: there the order of backends is fixed.")
    elif not wrong:
        takes = "cuda" if record.backend == "cuda" else f"{record.backend}, where cuda did not win,"
        say(f"\nThe automatic choice takes {takes} in {len(won)} of {len(classes)} shape classes:")
        for found in won:
            say(f"  {found}: {found.worst.ratio:.3f} of composed's time at the slowest point")
        if not classes:
            say("  no class has all its corners measured (see docs/dispatch.md)")


# ---- the command ---------------------------------------------------------------------------------


def _dry_run(args: argparse.Namespace, dtypes: Sequence[torch.dtype], out: Plain) -> None:
    device, backend = args.device, args.backend
    shapes = args.shapes or selfcheck.default_shapes(device)
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    out.line(
        f"would check every operator and form of {backend} on {device} in {names}, with dropout "
        "and without"
    )
    count = len(list(itertools.product(shapes, dtypes, (0, 1), shape_classes.PASSES)))
    out.line(f"would time {count} points: {', '.join('x'.join(map(str, s)) for s in shapes)}")
    if args.no_store:
        out.line("would store nothing")
    else:
        out.line(f"would store {verdicts.path_of(machines.of(device, backend), backend)}")


def _run(args: argparse.Namespace, out: Plain) -> int:
    args.backend = args.backend or args.device.type
    if args.clear and (args.device.type == "cpu" or torch.cuda.is_available()):
        removed = verdicts.clear(machines.of(args.device, args.backend), args.backend)
        missing = f"no verdict of {args.backend} on {args.device} was stored"
        out.line(f"removed {removed}" if removed else missing)
        return OK
    dtypes = args.dtype or selfcheck.default_dtypes(args.device, args.backend)
    selfcheck.backend_of(args.device, dtypes, args.backend)
    if args.dry_run:
        _dry_run(args, dtypes, out)
        return OK
    with out.progress(args.backend) as progress:
        record = selfcheck.selfcheck(
            args.device, args.backend, shapes=args.shapes, dtypes=dtypes,
            operators=not args.no_operators, seconds=args.seconds, keep=False, progress=progress,
        )  # fmt: skip
    if record.checks:
        out.table(_operators(record))
    out.table(_points(record))
    _conclusion(record, out.line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(records.dump(record), indent=1, allow_nan=False) + "\n")
    code = KERNEL_WRONG if record.wrong() else OK
    if not args.no_store:
        try:
            out.line(f"verdict: {selfcheck.store(record)}")
        except (verdicts.Untrusted, OSError) as error:
            out.line(
                f"the verdict was not stored: {error}; set {verdicts.ENV} to a folder of yours"
            )
            code = code or NO_RUN
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    args, out = _parser().parse_args(arguments), _printer()
    try:
        return _run(args, out)
    except CannotRun as why:
        out.line(f"selfcheck cannot run: {why}")
    except (verdicts.Untrusted, OSError) as error:
        out.line(f"selfcheck cannot run: {error}")
    return NO_RUN


if __name__ == "__main__":
    sys.exit(main())

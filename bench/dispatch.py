"""`python -m bench.dispatch`: writes lora_kernels/dispatch.json from bench/results/.

An entry gives rows if `bench.publish` would take its suite.json (finished, no stage failed, tests
passed, each sanitizer did or is excused in it, a clean commit), its selfcheck passed on the device
that the suite ran on, and the kernels measured have the hash of this tree's sources. It may hold
selfcheck.json, of backend cuda, selfcheck-triton.json, or both, each of which is judged alone; the
latter by suite-triton.json where there is one, which needs the tests of Triton and no sanitizer.
Rows are the shape classes that a selfcheck wins (`lora_kernels.shape_classes`); classes in which
composed was faster at some point go under "slower", which `explain` quotes and nothing follows.
What is refused is printed with the reason. The file is a function of bench/results/ and the
kernels' sources alone: a test compares it byte for byte.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from lora_kernels import dispatch, records, shape_classes
from lora_kernels.triton_kernels import digest

from . import gpu_suite, provenance, publish, report
from .stages import PASSED


def kernel_sources(root: Path = provenance.ROOT) -> str:
    """The hash of this tree's CUDA kernels."""
    return runpy.run_path(str(root / "csrc/digest.py"))["kernel_sources"](root / "csrc")


def triton_sources(suite: dict, root: Path = provenance.ROOT) -> str:
    """The hash of this tree's Triton kernels with the Triton that a suite ran."""
    return digest.of_version(suite["device"]["triton"], root / "lora_kernels/triton_kernels")


def refusals(
    suite: dict, record: records.Record, folder: Path, sources: str, backend: str = "cuda"
) -> list[str]:
    """Why a backend's record proves nothing about the kernels of this tree; nothing if it does."""
    found = publish.objections(suite)
    if found and suite["schema"] != gpu_suite.SCHEMA:
        return found
    status = {stage["name"]: stage["status"] for stage in suite["stages"]}
    stage = publish.SELFCHECKS[backend]
    if status.get(stage) != PASSED:
        found.append(f"stage {stage} {status.get(stage, 'is missing')}")
    if suite["dirty"] is not False or suite["commit"] == "unknown":
        found.append("its tree was not that of a commit")
    if wrong := record.wrong():
        found.append(f"wrong: {', '.join(wrong)}")
    if record.backend != backend:
        found.append(f"it is of backend {record.backend!r}")
    of_suite = suite["device"]["device_name"], "{}.{}".format(*suite["device"]["capability"])
    here = record.machine.device, record.machine.capability
    if here != of_suite or publish.slug(here[0]) != folder.name:
        found.append(
            f"selfcheck ran on {here[0]} {here[1]}, the suite on {of_suite[0]} {of_suite[1]}, and "
            f"the entry is {folder.name}"
        )
    if record.machine.sources != sources:
        found.append("its kernels are not those of this tree")
    return found


def rows_of(
    suite: dict, record: records.Record, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, slower) of a record that was not refused."""
    machine = record.machine._asdict()
    about = {key: machine[key] for key in ("device", "capability", "sources", "torch", "cuda")}
    place = {"folder": f"bench/results/{folder.name}", "commit": suite["commit"]}
    about |= {"backend": record.backend, "evidence": place}
    rows: list[dict[str, Any]] = []
    slower: list[dict[str, Any]] = []
    for found in shape_classes.classes(record.points):
        (rows if found.won else slower).append(dispatch.row_of(found, about))
    return rows, slower


def generate(results: Path, sources: str) -> tuple[dict[str, Any], list[str]]:
    """(the table, what was refused and why). `sources`: of this tree's CUDA kernels."""
    table: dict[str, Any] = {"schema": dispatch.SCHEMA, "rows": [], "slower": []}
    refused = []
    for folder in sorted({path.parent for path in results.glob("cuda-*/suite*.json")}):
        files = {b: folder / f"{stage}.json" for b, stage in publish.SELFCHECKS.items()}
        # an entry without either file is refused as one of cuda
        for backend in [b for b, file in files.items() if file.exists()] or ["cuda"]:
            try:
                suite = json.loads(publish.suite_of(folder, backend).read_text())
                record = records.parse(json.loads(files[backend].read_text()))
                own = sources if backend == "cuda" else triton_sources(suite)
                found = refusals(suite, record, folder, own, backend)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                found = [f"{type(error).__name__}: {error}"]
            if found:
                refused += [f"{folder.name}/{files[backend].name}: {why}" for why in found]
                continue
            rows, slower = rows_of(suite, record, folder)
            table["rows"] += rows
            table["slower"] += slower
    return table, refused


def dump(table: dict[str, Any]) -> str:
    """A row a line."""
    parts = [f'"schema": {table["schema"]}']
    for name in ("rows", "slower"):
        lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in table[name])
        parts.append(f'"{name}": [\n{lines}\n ]' if lines else f'"{name}": []')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dispatch",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=dispatch.TABLE, help="default: %(default)s")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the file would change"
    )
    args = parser.parse_args()
    table, refused = generate(args.results, kernel_sources())
    for why in refused:
        print(f"refused {why}")
    print(f"{len(table['rows'])} rows, {len(table['slower'])} classes where composed is faster")
    text = dump(table)
    if args.check:
        return int(not args.out.exists() or args.out.read_text() != text)
    args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

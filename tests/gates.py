"""What the compiled CUDA kernels must look like, checked without a GPU (tests/test_gates.py).

Every csrc/cuda/*.cu is compiled to one cubin an architecture with setup.py's flags; ptxas's log and
the machine code are then held against the tables of gate_rows.py.

    python tests/gates.py            problems, if any
    python tests/gates.py --write    the same, and writes docs/kernels.md
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import sass
from emulator import build
from gate_rows import ALLOWED, EXPECTED, FORMS, WATCHED, Allowance, Row
from includes import closure

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build/gates"
SHIPPED = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SOURCES = [*SHIPPED, ROOT / "tests/emulator/probes.cu"]  # probes: kernels that test the emulator
PAGE = ROOT / "docs/kernels.md"
CORES = 2  # of the machine whose build must stay short
YARDSTICK = ROOT / "tests/yardstick.cu"
# Of user CPU time for one architecture at that machine's best. Scaled, not measured: it took 3.3 s
# on a day on which a commit's build took 63.0 s that had taken 47.5 s before.
YARDSTICK_SECONDS = 2.5
PACE_LASTS = 10  # seconds, before the yardstick is compiled again


# ---- compiling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture. `seconds`: user CPU time that nvcc took, of a machine that
    took `pace` times its best for the yardstick then."""

    source: Path
    arch: str
    cubin: Path
    log: str
    seconds: float
    pace: float


class Pace:
    """How many times longer than at best the machine compiles now, at least 1.

    By a source that never changes, compiled among the others: a rented processor is shared, and
    what else it runs slows all of them alike.
    """

    def __init__(self, nvcc: str):
        self._nvcc, self._lock = nvcc, threading.Lock()
        self._value, self._measured = 1.0, -float("inf")

    def now(self) -> float:
        with self._lock:
            if time.monotonic() - self._measured > PACE_LASTS:
                seconds, _ = _run_nvcc(self._nvcc, YARDSTICK, architectures()[0], Path(os.devnull))
                self._value = max(1.0, seconds / YARDSTICK_SECONDS)
                self._measured = time.monotonic()
            return self._value


def setup_constant(name: str):
    """A literal that setup.py assigns: it cannot be imported, since it builds when it runs."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py assigns no {name}")


def nvcc_flags() -> list[str]:
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS  # what torch's build command adds

    return [*COMMON_NVCC_FLAGS, *setup_constant("NVCC_FLAGS"), f"-I{ROOT / 'csrc'}"]


def architectures() -> list[str]:
    """Those of setup.py's default build, as nvcc spells them: 80, 90a."""
    return [
        a.removesuffix("+PTX").replace(".", "") for a in setup_constant("DEFAULT_ARCHS").split(";")
    ]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvccs = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    return next(filter(None, nvccs), None) or shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\bV([\d.]+)", out)
    return match[1] if match else out


def compile_all(
    nvcc: str,
    sources: Sequence[Path] = SOURCES,
    archs: Sequence[str] | None = None,
    cache: Path = CACHE,
) -> list[Compiled]:
    """Every source for every architecture, two at a time; what did not change is not compiled.

    The lock makes a second process wait for the first and then find all of it done.
    """
    jobs = [(source, arch) for source in sources for arch in archs or architectures()]
    common = _digest([nvcc_version(nvcc), *nvcc_flags()], [])
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock, ThreadPoolExecutor(CORES) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pace = Pace(nvcc)
        done = list(pool.map(lambda job: _compile(nvcc, *job, common, cache, pace), jobs))
        current = {result.cubin.parent for result in done}
        for entry in cache.iterdir():
            if entry.is_dir() and entry not in current:
                shutil.rmtree(entry)
    return done


def _compile(nvcc: str, source: Path, arch: str, common: str, cache: Path, pace: Pace) -> Compiled:
    made_of = closure(source, [ROOT / "csrc"])
    place = cache / f"{source.stem}.{arch}.{_digest([common, arch], made_of)}"
    cubin, result = place / "kernels.cubin", place / "result.json"
    if not result.exists():
        place.mkdir(exist_ok=True)
        before = pace.now()
        seconds, text = _run_nvcc(nvcc, source, arch, cubin)
        during = (before + pace.now()) / 2
        draft = place / "result.draft"
        draft.write_text(json.dumps({"log": text, "seconds": seconds, "pace": during}))
        draft.rename(result)
    return Compiled(source, arch, cubin, **json.loads(result.read_text()))


def _run_nvcc(nvcc: str, source: Path, arch: str, cubin: Path) -> tuple[float, str]:
    """User CPU seconds, and what it printed."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *nvcc_flags(), target, "-cubin", "-o", str(cubin), str(source)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # its children's time is in its own
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{text}")
    return usage.ru_utime, text


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    total = hashlib.sha256(json.dumps(list(words)).encode())
    for file in files:
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """A kernel as compiled for one architecture. Memory in bytes; `code` None: not disassembled."""

    source: str
    arch: str
    symbol: str
    name: str = ""  # demangled, without parameters and `lora_kernels::`
    registers: int = 0
    barriers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0  # static
    remarks: list[str] = field(default_factory=list)
    code: sass.Code | None = None

    @property
    def empty(self) -> bool:
        """Whether its source left the body out, as for an architecture that cannot run it."""
        return self.code is not None and {*sass.counts(self.code)} <= _EMPTY


_EMPTY = {"MOV", "LDC", "EXIT", "BRA", "NOP", "BPT"}  # BPT: a trap
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_\w+'")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?, (\d+) bytes smem)?")
_REMARK = re.compile(r"\((C75\d\d)\) (.*)")


def read_kernels(compiled: Sequence[Compiled], nvdisasm: str | None) -> list[Kernel]:
    """All kernels, in order of source, architecture and name."""
    kernels: list[Kernel] = []
    for unit in compiled:
        found = read_log(unit.log, unit.source.name, unit.arch)
        if nvdisasm and found:
            listing = sass.disassemble(unit.cubin, nvdisasm)
            for kernel in found:
                kernel.code = listing[kernel.symbol]
        kernels += found
    names = demangle([kernel.symbol for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = name
    return sorted(kernels, key=lambda k: (k.source, k.arch, k.name))


def read_log(log: str, source: str, arch: str) -> list[Kernel]:
    """The kernels of one ptxas log.

    Functions that were not inlined count into the kernel before them in the log; a remark that
    names no kernel counts into all.
    """
    kernels: dict[str, Kernel] = {}
    kernel = Kernel(source, arch, "")
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernel = kernels[entry[1]] = Kernel(source, arch, entry[1])
        elif (function := _FUNCTION.search(line)) and function[1] in kernels:
            kernel = kernels[function[1]]
        elif memory := _MEMORY.search(line):
            kernel.stack += int(memory[1])
            kernel.spill_stores += int(memory[2])
            kernel.spill_loads += int(memory[3])
        elif used := _USED.search(line):
            kernel.registers, kernel.barriers, kernel.shared = (int(n or 0) for n in used.groups())
    for remark in _REMARK.finditer(log):
        named = [k for symbol, k in kernels.items() if f"'{symbol}'" in remark[2]]
        for k in named or kernels.values():
            k.remarks.append(f"{remark[1]}: " + remark[2].replace(f" '{k.symbol}'", ""))
    return list(kernels.values())


def demangle(symbols: Sequence[str]) -> list[str]:
    if not symbols:
        return []
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return done.stdout.replace("lora_kernels::", "").splitlines()


# ---- judging -------------------------------------------------------------------------------------


def problems(
    kernel: Kernel, expected: Sequence[Row] = EXPECTED, allowed: Sequence[Allowance] = ALLOWED
) -> list[str]:
    """Everything about a kernel that the tables do not allow.

    Of one that was not disassembled only what ptxas said: whether it needs a row is not known.
    """
    allowances = [a for a in allowed if matches(a, kernel)]
    found = [f"ptxas remark {remark}" for remark in kernel.remarks]
    spilled = max(kernel.spill_stores, kernel.spill_loads)
    if spilled > max((a.spilled for a in allowances), default=0):
        found.append(f"spills {kernel.spill_stores} bytes, reloads {kernel.spill_loads}")
    if kernel.stack > max((a.stack for a in allowances), default=0):
        found.append(f"stack frame of {kernel.stack} bytes")
    if kernel.code is not None:
        fences = sass.fences_in_main_loops(kernel.code)
        if fences > max((a.fences for a in allowances), default=0):
            found.append(f"{fences} GPU-wide fences (MEMBAR) in main loops")
        waits = sass.count(kernel.code, "WARPGROUP.DEPBAR")
        products = sass.count(kernel.code, "HGMMA")
        if products and waits >= products:
            found.append(f"wgmma is serialised: {waits} waits for {products} HGMMA")
        rows = [row for row in expected if matches(row, kernel)]
        if len(rows) == 1:
            found += wrong_counts(kernel.code, rows[0])
        elif rows or not kernel.empty:
            counts = sass.counts(kernel.code)
            has = {opcode: counts[opcode] for opcode in WATCHED if counts[opcode]}
            found.append(f"{len(rows)} rows of tests/gate_rows.py match, one must; {has}")
    return [f"{kernel.source}, sm_{kernel.arch}, {kernel.name}: {problem}" for problem in found]


def matches(rule: Row | Allowance, kernel: Kernel) -> bool:
    return rule.arch in (None, kernel.arch) and bool(re.fullmatch(rule.pattern, kernel.name))


def wrong_counts(code: sass.Code, row: Row) -> list[str]:
    counts = sass.counts(code) | sass.forms(code)
    found = []
    for opcode in (*WATCHED, *FORMS):
        wanted = row.opcodes.get(opcode, 0)
        least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        if counts[opcode] < least or (most is not None and counts[opcode] > most):
            bound = f"{least} or more" if most is None else f"{least} to {most}"
            found.append(f"{counts[opcode]} {opcode}, expected {bound}")
    return found


def slowest(compiled: Sequence[Compiled], share: float) -> list[Path]:
    """The fewest sources that take this share of the time, the slowest first."""
    times: dict[Path, float] = {}
    for unit in compiled:
        times[unit.source] = times.get(unit.source, 0.0) + unit.seconds / unit.pace
    sources = sorted(times, key=lambda source: times[source], reverse=True)
    ends = itertools.accumulate(times[source] for source in sources)
    before = (end - times[source] for source, end in zip(sources, ends, strict=True))
    wanted = share * sum(times.values())
    return [source for source, least in zip(sources, before, strict=True) if least < wanted]


def build_seconds(*compiled: Sequence[Compiled]) -> float:
    """Estimated seconds of a whole build on CORES idle cores, from the CPU time that nvcc took.

    Not the clock: other processes may have had the cores. setup.py compiles a source for its
    architectures one after another. Of units compiled several times the quickest counts.
    """
    quickest: dict[tuple[Path, str], float] = {}
    for unit in itertools.chain(*compiled):
        key, seconds = (unit.source, unit.arch), unit.seconds / unit.pace
        quickest[key] = min(seconds, quickest.get(key, seconds))
    by_source: dict[Path, float] = {}
    for (source, _), seconds in quickest.items():
        by_source[source] = by_source.get(source, 0.0) + seconds
    return max(sum(by_source.values()) / CORES, max(by_source.values(), default=0.0))


# ---- the page ------------------------------------------------------------------------------------


def dynamic_shared() -> dict[str, int]:
    """Bytes of dynamic shared memory by name of the tile, from the kernels' own headers."""
    return build.load(build.build()).shared_bytes()


def page(kernels: Sequence[Kernel], version: str, dynamic: Mapping[str, int] | None = None) -> str:
    """docs/kernels.md. `dynamic`: of `dynamic_shared`; a kernel of none of its tiles has 0."""
    dynamic = dynamic or {}
    lines = [
        "# Kernels as compiled",
        "",
        f"Written by `python tests/gates.py --write` with nvcc {version}; do not edit. Registers",
        "are per thread at launch, memory is in bytes, opcodes are instructions in the machine",
        "code, not executions. T: both 16-bit types, alike.",
    ]
    for arch in sorted({kernel.arch for kernel in kernels}):
        here = [(k, sass.counts(k.code or [])) for k in kernels if k.arch == arch and not k.empty]
        opcodes = [o for o in WATCHED if any(counts[o] for _, counts in here)]
        header = ["registers", "barriers", "spilled", "stack", "static shared", "dynamic shared"]
        header += [*opcodes, "instructions"]
        rows: dict[tuple, list[str]] = {}
        for k, counts in here:
            cells = [k.registers, k.barriers, k.spill_stores, k.stack, k.shared]
            cells += [next((size for tile, size in dynamic.items() if tile in k.name), 0)]
            cells += [*(counts[o] for o in opcodes), counts.total() - counts["NOP"]]
            generic = re.sub(r"ptx::b?f16", "T", k.name)
            rows.setdefault((generic, *cells), []).append(k.name)
        lines += ["", f"## sm_{arch}", "", " | ".join(["| kernel", *header]) + " |"]
        lines += ["|---|" + "---:|" * len(header)]
        for (generic, *cells), names in rows.items():
            name = names[0] if len(names) == 1 else generic
            lines.append(" | ".join([f"| `{name}`", *map(str, cells)]) + " |")
    return "\n".join(lines) + "\n"


def page_version() -> str | None:
    """The nvcc version that docs/kernels.md was written with."""
    match = re.search(r"with nvcc ([\d.]+);", PAGE.read_text()) if PAGE.exists() else None
    return match[1] if match else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md")
    arguments = parser.parse_args()
    nvcc, nvdisasm = find_nvcc(), sass.find_nvdisasm()
    if nvcc is None or nvdisasm is None:
        print("needs nvcc, and nvdisasm as pinned in requirements-dev.txt", file=sys.stderr)
        return 2
    compiled = compile_all(nvcc)
    shipped = [unit for unit in compiled if unit.source in SHIPPED]
    kernels = read_kernels(compiled, nvdisasm)
    if arguments.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(kernels, nvcc_version(nvcc), dynamic_shared()))
    found = [problem for kernel in kernels for problem in problems(kernel)]
    print("\n".join(found), end="\n" if found else "")
    print(f"{len(kernels)} kernels, {len(found)} problems, build {build_seconds(shipped):.1f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

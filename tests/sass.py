"""Reads a cubin's machine code: opcode counts of each kernel, and what its main loops contain."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# What moves operands to the tensor cores or multiplies there: the work of a main loop.
MAIN_LOOP_WORK = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")
# Fences that wait for the memory of the whole GPU or system, about a microsecond each.
GPU_FENCE = re.compile(r"MEMBAR\.\w+\.(GPU|SYS)")

_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L\w+):$")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_TARGET = re.compile(r"\.L\w+")
_TRANSPOSED = re.compile(r"\.tnsp[AB]")  # of a wgmma: stands behind its descriptors


@dataclass(frozen=True)
class Instruction:
    """One instruction; `targets` are positions in its kernel's code that it may jump to.

    A wgmma whose operands are transposed says so at the end of its opcode: .tnspA, .tnspB.
    """

    opcode: str
    targets: tuple[int, ...] = ()
    falls_through: bool = True


Code = list[Instruction]
Loop = frozenset[int]  # positions of its instructions


def find_nvdisasm() -> str | None:
    """The disassembler: the interpreter's own package first, since that one is pinned."""
    site = Path(sysconfig.get_path("purelib"))
    places = [*sorted(site.glob("nvidia/cu*/bin")), site / "nvidia/cuda_nvdisasm/bin"]
    places += [site / "triton/backends/nvidia/bin"]
    if found := shutil.which("nvdisasm", path=os.pathsep.join(map(str, places))):
        return found
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=f"{home}/bin")


def disassemble(cubin: Path, nvdisasm: str) -> dict[str, Code]:
    """The code of each function of a cubin, by mangled name."""
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(listing: str) -> dict[str, Code]:
    """What `nvdisasm -c` printed, by function."""
    functions: dict[str, list[re.Match]] = {}
    labels: dict[str, int] = {}
    lines: list[re.Match] = []
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            lines = functions.setdefault(section[1], [])
        elif label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction)
    return {
        name: [_instruction(line, labels, len(lines)) for line in lines]
        for name, lines in functions.items()
    }


def _instruction(line: re.Match, labels: dict[str, int], end: int) -> Instruction:
    opcode, operands = line["opcode"], line["operands"]
    kind = opcode.split(".")[0]
    targets: tuple[int, ...] = ()
    # BRA.U.ANY repeats one instruction for lanes whose operands differ: no loop of the source
    if kind in ("BRA", "BRX", "JMP", "JMX", "WARPSYNC") and not opcode.startswith("BRA.U.ANY"):
        targets = tuple(labels[t] for t in _TARGET.findall(operands) if labels.get(t, end) < end)
    # `BRA UP0, label` is as conditional as `@P0 BRA label`
    always = line["guard"] is None and (kind != "BRA" or operands.startswith("`("))
    stops = kind in ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")
    opcode += "".join(_TRANSPOSED.findall(operands))
    return Instruction(opcode, targets, falls_through=not (stops and always))


def counts(code: Code) -> Counter[str]:
    """How many instructions have each base opcode, the part before the first dot."""
    return Counter(instruction.opcode.split(".")[0] for instruction in code)


def count(code: Code, prefix: str) -> int:
    """How many instructions have an opcode that starts so, for example WARPGROUP.DEPBAR."""
    return sum(instruction.opcode.startswith(prefix) for instruction in code)


def forms(code: Code) -> Counter[str]:
    """How many wgmma transpose an operand, and how many fences are GPU-wide."""
    found = Counter(m[1:] for i in code for m in _TRANSPOSED.findall(i.opcode))
    found["MEMBAR.GPU"] = sum(1 for i in code if GPU_FENCE.match(i.opcode))
    return found


def fences_in_main_loops(code: Code) -> int:
    """How many GPU-wide fences stand in innermost loops that load for or use the tensor cores.

    An outer loop over tiles may have them, to publish a result: it pays once a tile.
    """
    working = [
        loop
        for loop in loops(code)
        if any(code[i].opcode.split(".")[0] in MAIN_LOOP_WORK for i in loop)
    ]
    innermost = [loop for loop in working if not any(other < loop for other in working)]
    inside = set().union(*innermost)
    return sum(1 for i in inside if GPU_FENCE.match(code[i].opcode))


def loops(code: Code) -> list[Loop]:
    """The natural loops of the control flow, one for each loop head.

    Address ranges of backward branches will not do: ptxas moves the slow path of a wait behind the
    kernel's end, and its jump back would span everything.
    """
    starts = _block_starts(code)
    block_of = {start: b for b, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    successors: list[set[int]] = []
    for end in ends:
        last = code[end - 1]
        after = {block_of[t] for t in last.targets}
        if last.falls_through and end in block_of:
            after.add(block_of[end])
        successors.append(after)
    dominators = _dominators(successors)
    predecessors: list[set[int]] = [set() for _ in starts]
    for block, after in enumerate(successors):
        if dominators[block]:
            for b in after:
                predecessors[b].add(block)

    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(successors):
        for head in after:
            if dominators[block] >> head & 1:
                _grow(bodies.setdefault(head, {head}), block, predecessors)
    return [
        frozenset(i for b in body for i in range(starts[b], ends[b])) for body in bodies.values()
    ]


def _grow(body: set[int], tail: int, predecessors: list[set[int]]) -> None:
    """Adds the blocks from which `tail` is reached without passing the loop's head."""
    pending = [tail]
    while pending:
        block = pending.pop()
        if block not in body:
            body.add(block)
            pending += predecessors[block]


def _block_starts(code: Code) -> list[int]:
    starts = {0}
    for i, instruction in enumerate(code):
        starts.update(instruction.targets)
        if (instruction.targets or not instruction.falls_through) and i + 1 < len(code):
            starts.add(i + 1)
    return sorted(starts) if code else []


def _dominators(successors: list[set[int]]) -> list[int]:
    """For each block the set, as bits, of those that every path to it passes; 0: unreachable."""
    if not successors:
        return []
    everything = (1 << len(successors)) - 1
    found = [0] * len(successors)
    found[0] = 1
    pending = [0]
    reached = {0}
    while pending:
        block = pending.pop()
        for after in successors[block]:
            fresh = ((found[after] if after in reached else everything) & found[block]) | 1 << after
            if after not in reached or fresh != found[after]:
                reached.add(after)
                found[after] = fresh
                pending.append(after)
    return found

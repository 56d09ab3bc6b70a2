"""Register fragments from the text of the PTX ISA, and Philox known answers.

    python3 fragments.py fragments.json

Section numbers are those of PTX ISA 9.2 (9.7.14 warp-level, 9.7.15 warpgroup-level matrix
instructions). Tables are indexed [lane or thread][element]; an element is 16 bits (A, B, ldmatrix,
stmatrix; two to a register, the lower half first) or a register (C, D), and a cell is [row, column]
of the operand. B is K x N, so its row is the k index. Where the ISA has only a figure the formula
is this project's. generate.py compares every table with NVIDIA's compiler.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

Table = list[list[list[int]]]


def table(lanes: int, elements: int, cell: Callable[[int, int], tuple[int, int]]) -> Table:
    return [[list(cell(lane, i)) for i in range(elements)] for lane in range(lanes)]


def mma_a(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.8, matrix fragments for mma.m16n8k16 with floating point type, A."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def mma_b(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.8, B."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def mma_c(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.8, accumulators C and D."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def wgmma_a(thread: int, i: int) -> tuple[int, int]:
    """9.7.15.5.1.1.1, matrix fragments for wgmma.mma_async.m64nNk16, A in registers (figure):
    warp w of the warpgroup holds rows 16 w .. 16 w + 15 as mma.m16n8k16 does."""
    row, col = mma_a(thread % 32, i)
    return row + 16 * (thread // 32), col


def wgmma_d(thread: int, i: int) -> tuple[int, int]:
    """9.7.15.5.1.1.1, accumulator D (figure): one mma.m16n8k16 C fragment to each 8 columns."""
    row, col = mma_c(thread % 32, i % 4)
    return row + 16 * (thread // 32), col + 8 * (i // 4)


def matrix(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.15 ldmatrix and 9.7.14.5.16 stmatrix, one m8n8.b16 matrix (figure): its row r in
    memory starts at the address lane 8 j + r gives for matrix j, held in register j."""
    return lane // 4, lane % 4 * 2 + i


def matrix_trans(lane: int, i: int) -> tuple[int, int]:
    """The same with .trans: the matrix is loaded (stored) in column-major format."""
    row, col = matrix(lane, i)
    return col, row


# Random123 tests/kat_vectors at commit 9545ff6: rounds, counter, key, result
PHILOX4X32 = """
 7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
 7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
 7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""

TABLES = {
    "mma.m16n8k16 A": table(32, 8, mma_a),
    "mma.m16n8k16 B": table(32, 4, mma_b),
    "mma.m16n8k16 C": table(32, 4, mma_c),
    "wgmma.m64nNk16 A": table(128, 8, wgmma_a),
    "wgmma.m64n16k16 D": table(128, 8, wgmma_d),
    "ldmatrix.m8n8.b16": table(32, 2, matrix),
    "ldmatrix.m8n8.trans.b16": table(32, 2, matrix_trans),
    "stmatrix.m8n8.b16": table(32, 2, matrix),
    "stmatrix.m8n8.trans.b16": table(32, 2, matrix_trans),
}


def philox() -> list[dict[str, object]]:
    rows = [line.split() for line in PHILOX4X32.split("\n") if line]
    return [{"rounds": int(r[0]), "counter": r[1:5], "key": r[5:7], "result": r[7:]} for r in rows]


def main() -> None:
    rows = [f'"{name}": {json.dumps(cells)}' for name, cells in TABLES.items()]
    answers = ",\n".join(json.dumps(row) for row in philox())
    rows.append(f'"philox4x32 (Random123 tests/kat_vectors, 9545ff6)": [\n{answers}\n]')
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()

"""The emulator and the descriptors against sources that are not ours (tests/emulator/oracle).

descriptors.json: what NVIDIA's CuTe-DSL compiles for wgmma of every operand layout, where each TMA
box goes, and which descriptor then reads it. fragments.json: register layouts by the formulas of
the PTX ISA, compared with the same compiler, and the known answers of Philox.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from emulator import build
from emulator.suite import bf16

ORACLE = build.EMULATOR / "oracle"
ROWS = json.loads((ORACLE / "descriptors.json").read_text())["rows"]
FRAGMENTS = json.loads((ORACLE / "fragments.json").read_text())
# What is built on: the 128-byte swizzle, and one block of N.
USED = [
    row
    for row in ROWS
    if all(o is None or (o["swizzle"] == 128 and o["k"] == 64) for o in (row["a"], row["b"]))
    and (row["a"] is None or row["a"]["rows"] == 64)
    and row["b"]["rows"] == row["n"]
    and row["n"] in (16, 32, 64, 128, 192, 256)
]
LANES = range(32)


def bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Small integers as bf16 or fp16 bit patterns."""
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    return bf16(values)


def row_name(row: dict) -> str:
    a = "registers" if row["a"] is None else row["a"]["major"]
    return f"{row['dtype']}-n{row['n']}-a_{a}-b_{row['b']['major']}"


def test_the_oracle_covers_what_kernels_use():
    names = {row_name(row) for row in USED}
    for n in (64, 128, 256):
        for a in ("K", "MN", "registers"):
            assert {f"bf16-n{n}-a_{a}-b_K", f"f16-n{n}-a_{a}-b_K"} <= names
    assert any(name.endswith("a_K-b_MN") for name in names)


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("row", USED, ids=row_name)
def test_their_boxes_and_descriptors_multiply(emulated, row, timing):
    """TMA into their boxes, wgmma by their descriptors: the emulator must get the exact product."""
    rng = np.random.default_rng(row["n"])
    n, k = row["n"], 64
    a, b = rng.integers(-3, 4, (64, k)), rng.integers(-3, 4, (n, k))

    def operand(spec, values):
        if spec is None:
            spec = {"major": "K", "box": [64, 64], "copies": [], "desc": "0x0", "starts": []}
        matrix = values if spec["major"] == "K" else values.T
        return dict(
            data=np.ascontiguousarray(bits(matrix, row["dtype"])),
            box=spec["box"],
            copies=[[to, *at] for to, at in spec["copies"]],
            descriptor=int(spec["desc"], 16),
            starts=spec["starts"],
            transposed=spec["major"] == "MN",
        )

    registers = []
    if row["a"] is None:
        halves = bits(a, row["dtype"]).astype(np.uint32)
        for step in range(4):
            for cells in FRAGMENTS["wgmma.m64nNk16 A"]:
                at = [int(halves[r, c + 16 * step]) for r, c in cells]
                registers += [at[i] | at[i + 1] << 16 for i in range(0, 8, 2)]
    is_bf16 = row["dtype"] == "bf16"
    got = emulated.wgmma(operand(row["a"], a), operand(row["b"], b), n, is_bf16, registers, timing)
    got = np.array(got).reshape(128, n // 2)
    d = np.full((64, n), np.nan)
    for thread, cells in enumerate(FRAGMENTS["wgmma.m64n16k16 D"]):
        for i in range(n // 2):
            r, c = cells[i % 8]
            d[r, c + 16 * (i // 8)] = got[thread, i]
    assert np.array_equal(d, a @ b.T)


def test_our_descriptors_are_theirs(emulated):
    """Bit for bit, but for a leading offset that a single panel leaves unused."""
    leading = 0x3FFF << 16
    for row in USED:
        for spec in (row["a"], row["b"]):
            if spec is None:
                continue
            k_major, mn_major, k_step, mn_step = emulated.descriptors(64 * 128)
            theirs = int(spec["desc"], 16)
            if spec["major"] == "K":
                assert theirs == k_major
                assert spec["starts"] == [i * k_step for i in range(4)]
            else:
                unused = leading if spec["rows"] <= 64 else 0
                assert theirs | unused == mn_major | unused
                assert spec["starts"] == [i * mn_step for i in range(4)]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_mma_fragments(emulated, dtype):
    rng = np.random.default_rng(1)
    a, b = rng.integers(-3, 4, (16, 16)), rng.integers(-3, 4, (16, 8))

    def pack(matrix, table):
        halves = bits(matrix, dtype).astype(np.uint32)
        flat = [int(halves[r, c]) for lane in LANES for r, c in FRAGMENTS[table][lane]]
        return [flat[i] | flat[i + 1] << 16 for i in range(0, len(flat), 2)]

    left, right = pack(a, "mma.m16n8k16 A"), pack(b, "mma.m16n8k16 B")
    got = np.array(emulated.mma(left, right, dtype == "bf16")).reshape(32, 4)
    d = np.full((16, 8), np.nan)
    for lane in LANES:
        for i, (r, c) in enumerate(FRAGMENTS["mma.m16n8k16 C"][lane]):
            d[r, c] = got[lane, i]
    assert np.array_equal(d, a @ b)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(emulated, transposed):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers = emulated.ldmatrix(matrices.ravel().tolist(), transposed)
    table = FRAGMENTS["ldmatrix.m8n8.trans.b16" if transposed else "ldmatrix.m8n8.b16"]
    for lane in LANES:
        for m in range(4):
            low, high = (int(matrices[m, r, c]) for r, c in table[lane])
            assert registers[4 * lane + m] == low | high << 16
    if not transposed:
        assert emulated.stmatrix(registers) == matrices.ravel().tolist()


def test_movmatrix(emulated):
    """Its operand as ldmatrix gives it, its result as the transposing one does."""
    matrix = np.arange(64, dtype=np.uint32).reshape(8, 8)

    def registers(name: str) -> list[int]:
        pairs = ([int(matrix[r, c]) for r, c in FRAGMENTS[name][lane]] for lane in LANES)
        return [low | high << 16 for low, high in pairs]

    given, expected = registers("ldmatrix.m8n8.b16"), registers("ldmatrix.m8n8.trans.b16")
    assert given != expected and emulated.movmatrix(given) == expected

"""Wgmma descriptors, instruction operands and TMA boxes as NVIDIA's own compiler emits them.

    python3 -m venv oracle-venv && oracle-venv/bin/pip install nvidia-cutlass-dsl==4.8.1
    oracle-venv/bin/python generate.py descriptors.json

CuTe-DSL compiles for sm_90a without a GPU. For each combination a one-warpgroup kernel is compiled
that loads a tile of A and of B with TMA, multiplies them with wgmma and stores the accumulators.
What the rows of the file say is read back from what the compiler emitted:

* `ptx`, `imm`: the instruction, and its immediates imm-scale-a, imm-scale-b, imm-trans-a,
  imm-trans-b (with A in registers, `a` null, there is no imm-trans-a);
* `desc`: the first descriptor, evaluated from the PTX with its tile at shared-memory address 0:
  `type` is bits 62-63 (0 none, 1 128 B, 2 64 B, 3 32 B), `base` bits 49-51, `lbo` and `sbo` the
  offsets in bytes. All the descriptors of an operand differ in the address field alone;
* `starts`: these addresses in bytes from the tile, one for each k16 step (outermost) and each
  block of 64 rows (A) or n rows (B);
* `box`, `map_swizzle`: box (innermost first) and CU_TENSOR_MAP_SWIZZLE_* value (0 none, 1 32 B,
  2 64 B, 3 128 B) of the tensor map, whose 16 words the emitted host code fills in;
* `copies`: [bytes from the tile, coordinates] of each TMA load of the tile, innermost first.

A tile of an operand is `rows` (M or N) x `k` elements, `major` K or MN; `swizzle` is in bytes, 16
for none. Where B has more rows than n, the wgmma reads a part of a swizzle atom. The script also
takes the register fragments of wgmma and mma.m16n8k16 from the global addresses the PTX moves them
from and to, and those of ldmatrix and stmatrix from CuTe's layouts of these instructions, and ends
with an error if they are not the tables of fragments.py.
"""

import argparse
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cutlass
import cutlass.memory
import fragments
from cutlass import cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor

MAJORS = {"K": OperandMajorMode.K, "MN": OperandMajorMode.MN}
TYPES = {"bf16": cutlass.BFloat16, "f16": cutlass.Float16}
GLOBAL = 2048  # extent of both modes of the global A and B


@dataclass(frozen=True)
class Operand:
    major: str
    swizzle: int
    rows: int  # of the shared-memory tile: M or N
    k: int

    def layout(self, dtype: Any) -> Any:
        name = f"{self.major}_{'INTER' if self.swizzle == 16 else f'SW{self.swizzle}'}"
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind[name], dtype)
        order = (0, 1) if self.major == "K" else (1, 0)
        return cute.tile_to_shape(atom, (self.rows, self.k), order=order)

    def tensor(self, dtype: Any, rows: int = GLOBAL, k: int = GLOBAL) -> Any:
        order = (1, 0) if self.major == "K" else (0, 1)
        return make_fake_compact_tensor(dtype, (rows, k), stride_order=order, assumed_align=16)


class Gemm:
    """One tile product by one warpgroup; `a` is None when A comes from registers."""

    def __init__(self, dtype: str, n: int, a: Operand | None, b: Operand) -> None:
        self.dtype, self.n, self.a, self.b = TYPES[dtype], n, a, b

    @cute.jit
    def __call__(self, ga: cute.Tensor, gb: cute.Tensor, gc: cute.Tensor):
        source = warpgroup.OperandSource
        op = warpgroup.MmaF16BF16Op(
            self.dtype,
            cutlass.Float32,
            (64, self.n, 16),
            source.SMEM if self.a else source.RMEM,
            MAJORS[self.a.major if self.a else "K"],
            MAJORS[self.b.major],
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        lb = self.b.layout(self.dtype)
        tb, gb = cpasync.make_tiled_tma_atom(load, gb, lb, (self.b.rows, self.b.k))
        la, ta = lb, tb
        if cutlass.const_expr(self.a is not None):
            la = self.a.layout(self.dtype)
            ta, ga = cpasync.make_tiled_tma_atom(load, ga, la, (self.a.rows, self.a.k))
        mma = cute.make_tiled_mma(cute.make_mma_atom(op))
        self.kernel(mma, ta, ga, la, tb, gb, lb, gc).launch(grid=(1, 1, 1), block=(128, 1, 1))

    @cute.jit
    def load(self, atom: cute.CopyAtom, src: cute.Tensor, dst: cute.Tensor, bar: cute.Pointer):
        src = cute.local_tile(src, cute.product_each(dst.shape), (0, 0))
        one = cute.make_layout(1)
        to, frm = cpasync.tma_partition(
            atom, 0, one, cute.group_modes(dst, 0, 2), cute.group_modes(src, 0, 2)
        )
        cute.copy(atom, frm, to, tma_bar_ptr=bar)

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        ta: cute.CopyAtom,
        ga: cute.Tensor,
        la: cute.ComposedLayout,
        tb: cute.CopyAtom,
        gb: cute.Tensor,
        lb: cute.ComposedLayout,
        gc: cute.Tensor,
    ):
        smem = cutlass.memory.SmemAllocator()
        sb = smem.allocate_tensor(self.dtype, lb.outer, 1024, lb.inner)
        bar = smem.allocate_array(cutlass.Int64, 1)
        thread = mma.get_slice(cute.arch.thread_idx()[0])
        self.load(tb, gb, sb, bar)
        if cutlass.const_expr(self.a is not None):
            sa = smem.allocate_tensor(self.dtype, la.outer, 1024, la.inner)
            self.load(ta, ga, sa, bar)
            ra = mma.make_fragment_A(thread.partition_A(sa))
        else:
            ra = mma.make_fragment_A(thread.partition_A(ga))
            cute.autovec_copy(thread.partition_A(ga), ra)
        cute.arch.mbarrier_wait(bar, 0)
        rb = mma.make_fragment_B(thread.partition_B(sb))
        out = thread.partition_C(gc)
        acc = cute.make_rmem_tensor(out.shape, cutlass.Float32)
        warpgroup.fence()
        mma.set(warpgroup.Field.ACCUMULATE, False)
        for k in cutlass.range_constexpr(self.b.k // 16):
            cute.gemm(mma, acc, ra[(None, None, k)], rb[(None, None, k)], acc)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        cute.autovec_copy(acc, out)


class Warp:
    """One mma.m16n8k16 on fragments loaded from, and stored to, global memory."""

    def __init__(self, dtype: str) -> None:
        self.dtype = TYPES[dtype]

    @cute.jit
    def __call__(self, ga: cute.Tensor, gb: cute.Tensor, gc: cute.Tensor):
        op = warp.MmaF16BF16Op(self.dtype, cutlass.Float32, (16, 8, 16))
        mma = cute.make_tiled_mma(op)
        self.kernel(mma, ga, gb, gc).launch(grid=(1, 1, 1), block=(32, 1, 1))

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, ga: cute.Tensor, gb: cute.Tensor, gc: cute.Tensor):
        thread = mma.get_slice(cute.arch.thread_idx()[0])
        ra = mma.make_fragment_A(thread.partition_A(ga))
        rb = mma.make_fragment_B(thread.partition_B(gb))
        out = thread.partition_C(gc)
        acc = cute.make_rmem_tensor(out.shape, cutlass.Float32)
        acc.fill(0.0)
        cute.autovec_copy(thread.partition_A(ga), ra)
        cute.autovec_copy(thread.partition_B(gb), rb)
        cute.gemm(mma, acc, ra, rb, acc)
        cute.autovec_copy(acc, out)


class Matrices:
    """The layouts of ldmatrix.x4 and stmatrix.x4: `at[name][lane][element]` is where the element
    of the lane's registers is, as 64 j + 8 row + column of the matrix j that lane 8 j + row
    gives the row address of."""

    def __init__(self) -> None:
        self.at: dict[str, list[list[int]]] = {}

    @cute.jit
    def __call__(self, unused: cute.Tensor):
        self.read()

    def read(self) -> None:
        for name, op in (("ld", warp.LdMatrix8x8x16bOp), ("st", warp.StMatrix8x8x16bOp)):
            for trans in (False, True):
                atom = cute.make_copy_atom(op(trans, 4), cutlass.BFloat16)
                memory, regs = atom.layout_src_tv, atom.layout_dst_tv
                if name == "st":
                    memory, regs = regs, memory
                if any(memory((t, v)) != 8 * t + v for t in range(32) for v in range(8)):
                    raise SystemExit(f"{name}matrix: the rows are not the lanes' addresses")
                self.at[f"{name}matrix.m8n8{'.trans' if trans else ''}.b16"] = [
                    [regs((t, v)) for v in range(8)] for t in range(32)
                ]


def build(kernel: Any, *tensors: Any) -> tuple[str, str]:
    """The PTX of a kernel, and its host code."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch sm_90a --keep-ptx --dump-dir {folder}"
        done = cute.compile(kernel, *tensors, options=options)
        return done.__ptx__, str(done.ir_module)


OPS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "shfl": lambda a, *_: a,  # the only shuffles broadcast a uniform value
    "ld": lambda a: a,  # of kernel parameters: pointers, taken as 0
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
}


def run(ptx: str, tid: int) -> tuple[dict[str, int], dict[str, int], list[tuple[str, list[str]]]]:
    """Registers after a straight-line run of the integer code, the global address (in bytes) that
    each register was loaded from or stored to, and the wgmma, mma and TMA instructions in order.
    Branches are not taken."""
    regs: dict[str, int] = {"%tid.x": tid}
    home: dict[str, int] = {}
    seen = []

    def value(text: str) -> int:
        base, _, plus = text.partition("+")
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", base):
            return int(base, 0)
        if base.startswith("%"):
            return regs[base] + (int(plus) if plus else 0)
        return 0  # the name of a parameter or of the shared memory

    body = re.sub(r"\n\s*\{%", " {%", ptx[ptx.index("{\n") :])  # mma.sync takes several lines
    for line in body.splitlines():
        text = re.sub(r"^@!?%p\d+\s+", "", line.strip().rstrip(";"))
        op, _, rest = text.partition(" ")
        args = re.findall(r"\{[^}]*\}|\[(?:[^\[\]{}]|\{[^}]*\})*\]|[^,\s]+", rest)
        name = op.split(".")[0]
        if op.startswith(("wgmma.mma_async", "mma.sync", "cp.async.bulk.tensor")):
            seen.append((op, args))
        elif op.startswith(("ld.global", "st.global")):
            data, where = args if name == "ld" else args[::-1]
            bits = int(re.findall(r"\.[bfu](\d+)", op)[-1])
            for i, reg in enumerate(re.findall(r"%\w+", data)):
                home[reg] = value(where.strip("[]")) + i * bits // 8
        elif name == "mov" and "{" in rest:  # pack or unpack two halves
            half = int(op[-2:]) // 2
            pair = re.findall(r"%\w+", next(a for a in args if "{" in a))
            if "{" in args[0]:
                whole = value(args[1])
                regs[pair[0]], regs[pair[1]] = whole & ((1 << half) - 1), whole >> half
            else:
                regs[args[0]] = value(pair[0]) | value(pair[1]) << half
        elif name in OPS and args and args[0].startswith("%") and not args[0].startswith("%p"):
            wide = re.search(r"[bsu]64|wide", op)
            mask = (1 << (64 if wide else 32)) - 1
            parts = [value(a.strip("[]")) for a in args[1:]]
            regs[args[0].split("|")[0]] = OPS[name](*parts) & mask
    return regs, home, seen


def tensor_map(host: str) -> list[list[int]]:
    """The tensor maps the host code fills in: 16 words each, 0 for what is not a constant.

    The format is not documented. Three fields are read here, found by compiling tiles that differ
    in one thing: swizzle in bits 13-14 of word 1, the box sizes less 1 in bits 56-63 of word 6
    (inner) and 0-7 of word 7 (second).
    """
    const = dict(re.findall(r"(%\d+) = llvm.mlir.constant\((-?\d+) : i64\)", host))
    where = re.findall(
        r"(%\d+) = llvm.getelementptr (%\d+)\[0, (\d+)\] : .*llvm.array<16 x i64>", host
    )
    slot = {name: (base, int(index)) for name, base, index in where}
    maps: dict[str, list[int]] = {}
    for data, name in re.findall(r"llvm.store (%\d+), (%\d+) : i64", host):
        if name in slot:
            base, index = slot[name]
            maps.setdefault(base, [0] * 16)[index] = int(const.get(data, 0)) & (2**64 - 1)
    return list(maps.values())


def operand(op: Operand, words: list[int], loads: list[list[int]], descs: list[int]) -> dict:
    """What one operand of a kernel came out as; `loads` are its [shared address, coordinates]."""
    first, tile = descs[0], loads[0][0]
    if any((d ^ first) >> 14 for d in descs):
        raise SystemExit("descriptors differ outside the address")
    starts = [((d & 0x3FFF) << 4) - tile for d in descs]  # repeats itself for the other's blocks
    return {
        **vars(op),
        "desc": f"0x{first - (tile >> 4):016x}",
        "type": first >> 62,
        "base": first >> 49 & 7,
        "lbo": (first >> 16 & 0x3FFF) << 4,
        "sbo": (first >> 32 & 0x3FFF) << 4,
        "starts": [s for s, last in zip(starts, [None, *starts], strict=False) if s != last],
        "box": [(words[6] >> 56) + 1, (words[7] & 0xFF) + 1],
        "map_swizzle": words[1] >> 13 & 3,
        "copies": [[smem - tile, coords] for smem, coords in loads],
    }


def output(rows: int, cols: int) -> Any:
    return make_fake_compact_tensor(
        cutlass.Float32, (rows, cols), stride_order=(1, 0), assumed_align=16
    )


def compile_gemm(dtype: str, n: int, a: Operand | None, b: Operand) -> tuple[str, str]:
    """PTX and host code of one combination."""
    element = TYPES[dtype]
    ga = a.tensor(element) if a else Operand("K", 0, 64, b.k).tensor(element, 64, b.k)
    return build(Gemm(dtype, n, a, b), ga, b.tensor(element), output(a.rows if a else 64, b.rows))


def address(regs: dict[str, int], text: str) -> int:
    base, _, plus = text.strip("[]").partition("+")
    return regs[base] + int(plus or 0)


def row(dtype: str, n: int, a: Operand | None, b: Operand) -> dict[str, Any]:
    ptx, host = compile_gemm(dtype, n, a, b)
    regs, _, seen = run(ptx, 0)
    maps = tensor_map(host)  # in the order the kernel function makes them: B, then A
    loads = [
        [address(regs, args[0]), [address(regs, r) for r in re.findall(r"%r\d+", args[1])]]
        for op, args in seen
        if op.startswith("cp.async")
    ]
    mmas = [(op, args) for op, args in seen if op.startswith("wgmma")]
    of_b = b.rows * b.k // (((maps[0][6] >> 56) + 1) * ((maps[0][7] & 0xFF) + 1))
    return {
        "dtype": dtype,
        "n": n,
        "ptx": mmas[0][0],
        "imm": [int(x) for x in mmas[0][1][4:]],
        "a": a and operand(a, maps[1], loads[of_b:], [regs[args[1]] for _, args in mmas]),
        "b": operand(b, maps[0], loads[:of_b], [regs[args[2]] for _, args in mmas]),
    }


def combinations() -> list[tuple[str, int, Operand | None, Operand]]:
    out: list[tuple[str, int, Operand | None, Operand]] = []
    for dtype in TYPES:
        for major in MAJORS:
            for n in (64, 128, 256):
                b = Operand(major, 128, n, 64)
                out += [(dtype, n, Operand(m, 128, 64, 64), b) for m in MAJORS]
                out += [(dtype, n, None, b)]
    for major in MAJORS:  # two blocks of 64 rows; a longer tile; other swizzles
        out += [("bf16", 128, Operand(major, 128, 128, 64), Operand(major, 128, 128, 64))]
        out += [("bf16", 256, Operand(major, 128, 64, 128), Operand(major, 128, 256, 128))]
        for s in (64, 32, 16):
            out += [("bf16", 128, Operand(major, s, 64, 64), Operand(major, s, 128, 64))]
    a = Operand("K", 128, 64, 64)
    for n in (8, 16, 32):
        out += [("bf16", n, a, Operand("K", 128, n, 64))]
    for n, s in ((8, 16), (16, 32), (32, 64), (24, 16), (48, 32), (96, 64), (192, 128)):
        out += [("bf16", n, a, Operand("MN", s, n, 64))]  # the widest swizzle that divides n
    for n, s in ((8, 128), (16, 128), (32, 128), (8, 64), (16, 64)):
        out += [("bf16", n, a, Operand("MN", s, s // 2, 64))]  # a part of one atom
    return out


def check(name: str, regs: str, home: dict[str, int], size: int, cols: int, want: Any) -> None:
    """That the elements of `size` bytes of the registers live at the [row, column]s `want`."""
    names = re.findall(r"%\w+", regs)
    per = 4 // size
    for i, cell in enumerate(want):
        at = divmod(home[names[i // per]] // size + i % per, cols)
        if at != tuple(cell):
            raise SystemExit(f"{name}: element {i} is at {at}, not {cell}")


def check_fragments() -> list[str]:
    ptx, _ = compile_gemm("bf16", 256, None, Operand("K", 128, 256, 64))
    for tid in range(128):
        _, home, seen = run(ptx, tid)
        args = next(args for op, args in seen if op.startswith("wgmma"))
        want = [fragments.wgmma_d(tid, i) for i in range(128)]
        check("wgmma D", args[0], home, 4, 256, want)
        check("wgmma A", args[1], home, 2, 64, [fragments.wgmma_a(tid, i) for i in range(8)])
    tile = Operand("K", 0, 0, 0).tensor
    a, b = tile(TYPES["bf16"], 16, 16), tile(TYPES["bf16"], 8, 16)
    ptx, _ = build(Warp("bf16"), a, b, output(16, 8))
    for lane in range(32):
        _, home, seen = run(ptx, lane)
        args = next(args for op, args in seen if op.startswith("mma.sync"))
        transposed = [fragments.mma_b(lane, i)[::-1] for i in range(4)]  # B is stored n x k
        check("mma C", args[0], home, 4, 8, [fragments.mma_c(lane, i) for i in range(4)])
        check("mma A", args[1], home, 2, 16, [fragments.mma_a(lane, i) for i in range(8)])
        check("mma B", args[2], home, 2, 16, transposed)
    matrices = Matrices()
    build(matrices, output(16, 8))
    for name, lanes in matrices.at.items():
        for lane, cells in zip(fragments.TABLES[name], lanes, strict=True):
            if cells != [64 * j + 8 * row + col for j in range(4) for row, col in lane]:
                raise SystemExit(f"{name}: {cells} is not {lane}")
    names = ["wgmma.m64n256k16 A", "wgmma.m64n256k16 D", *(f"mma.m16n8k16 {x}" for x in "ABC")]
    return names + list(matrices.at)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the oracle's table.")
    parser.add_argument("output", type=Path)
    path = parser.parse_args().output
    warnings.simplefilter("ignore")
    head = {
        "package": f"nvidia-cutlass-dsl {version('nvidia-cutlass-dsl')}",
        "target": "sm_90a",
        "fragments_checked": check_fragments(),
    }
    rows = ",\n".join(json.dumps(row(*c), separators=(",", ":")) for c in combinations())
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()

"""Planted bugs of the decode kernel, as in mutants.py."""

from __future__ import annotations

from mutants import Mutant

KERNEL, END = "csrc/cuda/decode.cuh", "csrc/cuda/decode_end.cuh"
PLAN = "csrc/cuda/decode_plan.cpp"


def decode(file: str, name: str, text: str, replacement: str) -> Mutant:
    return Mutant(f"decode: {name}", file, text, replacement, ("decode",), "decode")


# Every third runs in the fast tests: order matters.
KILLED = [
    # the cluster
    decode(KERNEL, "sums read before the others are done",
           "  if (clustered) {\n    ptx::cluster_arrive();\n    ptx::cluster_wait();\n  }\n", ""),
    decode(KERNEL, "block leaves while others read",
           "  if (clustered) ptx::cluster_wait();  // no block leaves", "  // no block leaves"),
    decode(END, "sums of the first block for those of all",
           "ptx::load_shared_remote_x4(part[rank], at, rank)",
           "ptx::load_shared_remote_x4(part[rank], at, 0)"),
    decode(END, "last part of K left out", "if (rank < splits) total[e]",
           "if (rank + 1 < splits) total[e]"),
    decode(END, "share of the first block", "uint32_t i = place.rank + work.splits * warp;",
           "uint32_t i = work.splits * warp;"),
    decode(KERNEL, "parts of K a stage apart",
           "const int64_t first = place.rank * work.stages * kRowElements;",
           "const int64_t first = place.rank * (work.stages - 1) * kRowElements;"),
    decode(KERNEL, "totals of y not gathered",
           "  if (clustered) gather_share<Tile>(work, place, end, warp, lane);\n", ""),
    # the ring
    decode(KERNEL, "stage read before it is there", "ptx::cp_async_wait<Tile::kStages - 2>();",
           "ptx::cp_async_wait<Tile::kStages - 1>();"),
    decode(KERNEL, "stage overwritten while read", "ptx::cp_async_wait<Tile::kStages - 2>();\n"
           "    ptx::block_sync();", "ptx::cp_async_wait<Tile::kStages - 2>();"),
    decode(KERNEL, "ring entered at its start",
           "Tile::kStages - 1 - static_cast<uint32_t>(work.stages % Tile::kStages)", "0"),
    decode(KERNEL, "sums over stages in use", "  ptx::block_sync();  // the stages are free, and B "
           "is here\n", ""),
    decode(KERNEL, "stages of the first turns not committed", "ptx::cp_async_commit();\n"
           "    advance", "if (s >= 0) ptx::cp_async_commit();\n    advance"),
    # rows
    decode(KERNEL, "rows of A where W begins", "const int64_t n = place.column + row - work.ranks;",
           "const int64_t n = place.column + row;"),
    decode(KERNEL, "ranks past the last", "row < args.down.r ? ranks + row * a.row_stride : "
           "nullptr", "ranks + row * a.row_stride"),
    decode(KERNEL, "columns past the last", "else if (n < place.end)", "else"),
    decode(KERNEL, "end of a row of K", "left > 8 ? kChunkBytes : static_cast<uint32_t>(left) * 2",
           "kChunkBytes"),
    decode(KERNEL, "columns of x's fragments exchanged",
           "ptx::mma_m16n8k16(sum[u][2 * p], w, b[0], b[2], T{});",
           "ptx::mma_m16n8k16(sum[u][2 * p], w, b[0], b[1], T{});"),
    # dropout
    decode(KERNEL, "mask on the x of y", "b[v] = is_a ? dropped[p][v] : x[p][v]",
           "b[v] = dropped[p][v]"),
    decode(KERNEL, "no mask on the x of h", "b[v] = is_a ? dropped[p][v] : x[p][v]",
           "b[v] = x[p][v]"),
    decode(KERNEL, "mask of the first rows",
           "apply_dropout(dropped[p], below(dropout, p * kUnit), k",
           "apply_dropout(dropped[p], below(dropout, 0), k"),
    decode(KERNEL, "masked units of another warp",
           "work.ranks / kUnit - static_cast<int>(warp_n) * Tile::kUnits", "work.ranks / kUnit"),
    decode(KERNEL, "straddling mask of another slice",
           "k + warp_k * kMmaDepth,", "k,"),
    # the end
    decode(END, "sums of one slice of the warps", "if (slice > 0) ptx::load_shared_x4(total, at);",
           ""),
    decode(END, "slices added at once", "    ptx::block_sync();\n  }\n}", "  }\n}"),
    decode(END, "h not rounded as x is",
           "ptx::pack(total[2 * half] * args.scale, total[2 * half + 1] * args.scale, T{})",
           "ptx::pack(total[2 * half] * args.scale, total[2 * half + 1], T{})"),
    decode(END, "h written by every tile",
           "place.column == 0 && place.rank == 0", "place.rank == 0"),
    decode(END, "h of the last row left out", "if (row + 1 < args.M)\n        ptx::store_global(at "
           "+ args.h.row_stride", "if (row + 2 < args.M)\n        ptx::store_global(at + "
           "args.h.row_stride"),
    decode(KERNEL, "h read before it is there", "  ptx::block_sync();  // h is there\n", ""),
    decode(END, "h not swizzled", "(block ^ swizzle) * kChunkBytes", "block * kChunkBytes"),
    decode(END, "bias twice", "v[e] += args.scale * lora[block][e] + bias[e / 2]",
           "v[e] += args.scale * lora[block][e] + 2 * bias[e / 2]"),
    decode(END, "scale of the up projection dropped", "args.scale * lora[block][e]",
           "lora[block][e]"),
    decode(END, "y past the last column", "if (column >= end) continue;", ""),
    decode(END, "y past the last row", "if (row + 1 < args.M)\n      ptx::store_global(at + "
           "args.y.row_stride", "ptx::store_global(at + args.y.row_stride"),
    decode(END, "B past its last rank", "left < 0 ? 0 : left > 8 ? 8 : static_cast<int>(left)",
           "left > 0 ? 8 : 0"),
    decode(END, "bias of the first tile", "bias + n * args.bias.col_stride",
           "bias + row * args.bias.col_stride"),
    decode(END, "one step of the ranks", "step < work.ranks / kMmaDepth && args.scale != 0",
           "step < 1 && args.scale != 0"),
    # the plan
    decode(PLAN, "a part of K short", "ceil_div(ceil_div(a.gemm.K, kRowElements), splits)",
           "ceil_div(a.gemm.K, kRowElements) / splits"),
    decode(PLAN, "vectors of x that has none", "has_vectors(args.down.x, args.down.M)", "true"),
]  # fmt: skip

SURVIVORS: list[tuple[Mutant, str]] = []

"""Planted bugs: one replacement of source text each, and the part of the suite that must notice.

A mutant is (name, file, text, replacement, sources that are compiled with it, suite). The text must
occur in the file exactly once; any white space in it stands for any other.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

COPY = "csrc/cuda/copy_tile.cuh"
SM80, SM90 = "csrc/cuda/down_proj_sm80.cuh", "csrc/cuda/down_proj_sm90.cuh"
DROPOUT, STORE = "csrc/cuda/dropout.cuh", "csrc/cuda/store_h.cuh"
DROPPED, COPY = "csrc/cuda/dropped_tile.cuh", "csrc/cuda/copy_tile.cuh"
PLAN, PLAN_HEADER = "csrc/cuda/down_proj_plan.cpp", "csrc/cuda/down_proj_plan.h"
WORK = "csrc/cuda/down_proj_work.h"
DESCRIPTOR, OPERAND = "csrc/cuda/descriptor.h", "csrc/cuda/tma_operand.h"
PROBES = "tests/emulator/probes.cuh"


class Mutant(NamedTuple):
    name: str
    file: str
    text: str
    replacement: str
    sources: tuple[str, ...]
    suite: str


class Planted(Protocol):
    """A mutant of any kind, as far as its text goes."""

    @property
    def text(self) -> str: ...


def spots(mutant: Planted, source: str) -> list[re.Match]:
    """Where its text occurs, any white space in it standing for any other."""
    pattern = r"\s+".join(map(re.escape, mutant.text.split()))
    return list(re.finditer(pattern, source))


# A function of a shared header is one symbol in the library, whichever object it comes from.
BOTH = ("down_proj_sm80", "down_proj_sm90")


def sm80(name: str, text: str, replacement: str, file: str = SM80) -> Mutant:
    return Mutant(name, file, text, replacement, BOTH[:1] if file in (SM80, COPY) else BOTH, "sm80")


def sm90(name: str, text: str, replacement: str, file: str = SM90) -> Mutant:
    return Mutant(name, file, text, replacement, BOTH[1:] if file == SM90 else BOTH, "sm90")


def plan(name: str, text: str, replacement: str, suite: str) -> Mutant:
    return Mutant(name, PLAN, text, replacement, ("down_proj",), suite)


def group(name: str, text: str, replacement: str, file: str = SM90) -> Mutant:
    return Mutant(name, file, text, replacement, BOTH[1:], "group")


def probe(name: str, text: str, replacement: str, suite: str) -> Mutant:
    return Mutant(name, PROBES, text, replacement, ("probes",), suite)


KILLED = [
    # descriptors and swizzle
    sm90("wrong LBO", "step * kMnMajorStep, kRowElements * kRowBytes)",
         "step * kMnMajorStep, kAtomBytes)"),
    sm90("wrong SBO", "return matrix_descriptor(address, kChunkBytes, kAtomBytes);",
         "return matrix_descriptor(address, kChunkBytes, kRowBytes);", DESCRIPTOR),
    sm90("wrong k advance of x", "ring.x(s) + step * kKMajorStep", "ring.x(s) + step * 16"),
    sm90("wrong k advance of down", "mn_major_descriptor(tile + step * kMnMajorStep",
         "mn_major_descriptor(tile + step * kKMajorStep"),
    sm90("transposition not said", "ptx::wgmma<T, 0, kMnMajor>", "ptx::wgmma<T, 0, 0>"),
    sm90("unswizzled ldmatrix", "x + swizzled(offset)", "x + offset", DROPPED),
    sm90("wrong swizzle", "offset ^ ((offset >> 7 & 7) << 4)", "offset ^ ((offset >> 7 & 3) << 4)",
         DESCRIPTOR),
    # pipeline
    sm90("early slot release",
         "ptx::wgmma_wait<0>(); if (lane == 0) ptx::barrier_arrive(ring.empty(s));",
         "if (lane == 0) ptx::barrier_arrive(ring.empty(s)); ptx::wgmma_wait<0>();"),
    sm90("wrong phase of full", "    ptx::barrier_wait(ring.full(s), i / Tile::kStages & 1);\n"
         "    ptx::wgmma_keep(sum);",
         "    ptx::barrier_wait(ring.full(s), (i / Tile::kStages + 1) & 1);\n"
         "    ptx::wgmma_keep(sum);"),
    sm90("wrong phase of empty", "(round - 1) & 1", "round & 1"),
    sm90("too few tx bytes", "ring.full(s), Tile::kStageBytes)", "ring.full(s), Tile::kXBytes)"),
    sm90("too many tx bytes", "ring.full(s), Tile::kStageBytes)",
         "ring.full(s), Tile::kStageBytes + 16)"),
    sm90("full not waited for", "    ptx::barrier_wait(ring.full(s), i / Tile::kStages & 1);\n"
         "    multiply_dropped", "    multiply_dropped"),
    sm90("empty not waited for",
         "    if (round > 0) ptx::barrier_wait(ring.empty(s), (round - 1) & 1);\n", ""),
    sm90("empty counts one warp", "ring.empty(s), 4)", "ring.empty(s), 1)"),
    sm90("barriers not fenced", "    ptx::barrier_init_fence();\n", ""),
    sm90("barriers used before they are known", "  ptx::block_sync();\n\n  if (warp == kProducer)",
         "  if (warp == kProducer)"),
    sm90("one panel missing", "p < Tile::kRank / 64; ++p", "p < (Tile::kRank + 64) / 128; ++p"),
    sm90("next k-block skipped", "int k = static_cast<int>(i * kRowElements)",
         "int k = static_cast<int>((i + i / 3) * kRowElements)"),
    # wgmma
    sm90("fragments reused while read",
         "ptx::wgmma_wait<0>();", "ptx::wgmma_wait<1>();", DROPPED),
    sm90("sums used before they are there", "ptx::wgmma_wait<0>(); if (lane",
         "ptx::wgmma_wait<1>(); if (lane"),
    sm90("no wgmma fence", "    ptx::wgmma_keep(sum);\n    ptx::wgmma_fence();\n    LK_UNROLL\n"
         "    for (uint32_t step", "    ptx::wgmma_keep(sum);\n    LK_UNROLL\n"
         "    for (uint32_t step"),
    sm90("no commit", "    ptx::wgmma_commit();\n", "", DROPPED),
    # exchange of the sums
    sm90("stages overwritten while read",
         "ptx::named_barrier_sync<1>(256);", ""),
    sm90("sums read before they are written", "  ptx::named_barrier_sync<2>(256);\n", ""),
    sm90("one warpgroup forgotten", "sum[i] += ptx::load_shared(at(i))",
         "sum[i] += 0 * ptx::load_shared(at(i))"),
    sm90("barrier of the wrong size", "ptx::named_barrier_sync<1>(256)",
         "ptx::named_barrier_sync<1>(128)"),
    # dropout
    sm90("mask shifted by a fragment",
         "apply_dropout(a[j], dropout, column + step * kMmaDepth, kept >> 8 * step)",
         "apply_dropout(a[j], dropout, column + step * kMmaDepth + 16, kept >> 8 * step)", DROPPED),
    sm90("mask rows of another warp", "load_dropout(mask, row + warp % 4 * 16, lane)",
         "load_dropout(mask, row, lane)"),
    sm90("threshold itself dropped", "kMaskBits), d.threshold)", "kMaskBits), d.threshold + 65537)",
         DROPOUT),
    sm90("mask registers exchanged", "words.v[v] & (kMaskBits", "words.v[v ^ 1] & (kMaskBits",
         DROPOUT),
    sm80("shard origin ignored", "column_group(first_col + lane % 4 * 2)",
         "column_group(lane % 4 * 2)", DROPOUT),
    sm80("unaligned origin taken as aligned", "row0(d) % 16 == 0 && first_col % 16 == 0}",
         "true}", DROPOUT),
    sm80("column origin taken as aligned", "row0(d) % 16 == 0 && first_col % 16 == 0}",
         "row0(d) % 16 == 0}", DROPOUT),
    sm80("row origin taken as aligned", "row0(d) % 16 == 0 && first_col % 16 == 0}",
         "first_col % 16 == 0}", DROPOUT),
    sm80("origins aligned to 8", "row0(d) % 16 == 0 && first_col % 16 == 0}",
         "row0(d) % 8 == 0 && first_col % 8 == 0}", DROPOUT),
    sm90("seed of 32 bits", "static_cast<uint64_t>(d.seed[0])", "static_cast<uint32_t>(d.seed[0])",
         DROPOUT),
    sm90("mask repeats after 4096 columns", "d.column_group + col / 4",
         "d.column_group + col % 4096 / 4", DROPOUT),
    sm80("mask drawn with six rounds", "kPhiloxRounds = 7", "kPhiloxRounds = 6", "csrc/philox.h"),
    sm80("one mask for all rows", "args.dropout, block_row + warp_m * 16, lane",
         "args.dropout, warp_m * 16, lane"),
    # cp.async ring
    sm80("stage not waited for", "ptx::cp_async_wait<Tile::kStages - 2>()",
         "ptx::cp_async_wait<Tile::kStages - 1>()"),
    sm80("stage overwritten while read", "      ptx::block_sync();\n    }\n    const int64_t next",
         "    }\n    const int64_t next"),
    sm80("commits not counted", "load(next_slot, next); ptx::cp_async_commit();",
         "load(next_slot, next), ptx::cp_async_commit();"),
    sm80("wrong stage", "slot = 0, next_slot = 0;", "slot = 0, next_slot = 1;"),
    sm80("fragments of down exchanged", "a, b[0], b[1], T{})", "a, b[0], b[2], T{})"),
    sm80("bank conflicts", "chunk ^ (row & 7)", "chunk ^ (row & 3)"),
    sm80("slices added too early", "  ptx::block_sync();\n  if (warp_k > 0) return;",
         "  if (warp_k > 0) return;"),
    sm80("a slice forgotten", "uint32_t slice = 1; slice", "uint32_t slice = 2; slice"),
    # tails
    sm80("row tail off by one", "first + i * kRowStep < m.rows", "first + i * kRowStep <= m.rows",
         COPY),
    sm80("depth tail off by one", "left = m.cols - col,", "left = m.cols - col + 1,", COPY),
    sm80("rank tail off by one", "d.row_stride, d.col_stride, args.r, args.K,",
         "d.row_stride, d.col_stride, args.r + 1, args.K,"),
    sm90("store past the last row", "r >= args.M || col >= args.r", "r > args.M || col >= args.r",
         STORE),
    sm80("store past the last rank", "pairs && col + 1 < args.r", "pairs && col < args.r", STORE),
    sm80("offset of 32 bits", "m.data + first * m.row_stride + col * m.col_stride",
         "m.data + static_cast<int>(first * m.row_stride) + col * m.col_stride", COPY),
    sm80("column stride of h ignored", "+ col * h.col_stride;", "+ col;", STORE),
    plan("pairs into odd places", "reinterpret_cast<uintptr_t>(a.h.data) % 4 == 0", "true", "sm80"),
    sm80("scale forgotten", "sum[2 * half + 1] * args.scale", "sum[2 * half + 1]", STORE),
    # host side
    plan("stride of a single row", "rows > 1 ? m.row_stride : width()",
         "rows > 1 ? m.row_stride : columns", "sm90")._replace(file=OPERAND),
    plan("box of the wrong height", ".map(nullptr, plan.tile.rows)", ".map(nullptr, 32)", "sm90"),
    sm80("rank blocks write over one another", "(args.h.data) + first * args.h.col_stride",
         "(args.h.data)", PLAN_HEADER),
    sm90("every rank block loads the first", "k, rank);", "k, 0);"),
    sm90("every rank block loads the first panels", "rank + p * 64", "p * 64"),
    plan("alignment ignored", "m.col_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 "
         "&& (rows == 1 || m.row_stride % 8 == 0)", "m.col_stride == 1",
         "sm80")._replace(file=OPERAND),
    # groups
    group("box an atom too far", "work.place[p].column * kRowBytes",
          "(work.place[p].column + 8) * kRowBytes"),
    group("every projection loads the first", "maps.down + p", "maps.down"),
    group("first columns of a projection left out", "if (n >= begin)", "if (n > begin)"),
    group("columns of the tile", "n - begin, block", "n, block"),
    group("every projection stores to the first", "rank_slice(work.each[p],",
          "rank_slice(work.each[share.first],"),
    group("pairs of the first h", "work.place[p].h_pairs", "work.place[0].h_pairs"),
    group("mask of the first projection", "work.each[share.first].dropout", "work.each[0].dropout"),
    group("every block the first part", "blockIdx.x % work.parts", "0"),
    group("rows of a block for each part", "blockIdx.x / work.parts}", "blockIdx.x}"),
    group("last projection of a part left out", "work.place[last].part <= part",
          "work.place[last].part < part", WORK),
    group("first projection of a part left out", "while (first > 0 &&", "while (first > 1 &&",
          WORK),
    group("every slice the first", "(part - begin) * tile_rank", "0", WORK),
    plan("ranks not padded to atoms", "padded = ceil_div(each[i].r, 8) * 8", "padded = each[i].r",
         "group"),
    plan("more ranks than a tile has", "used + padded > capacity", "used > capacity", "group"),
    plan("one mask for a tile", "dropout || padded > capacity", "padded > capacity", "group"),
    plan("part of a slice shared", "dropout || padded > capacity", "dropout", "group"),
    plan("last tile not counted", "if (used > 0) ++parts;", "", "group"),
    plan("boxes over one another", "(shared ? plan.place[i + 1].column : t.rank)", "(t.rank)",
         "group"),
    plan("a tile for each projection", "if (used > 0 && (alone ||", "if (used > 0 && (true ||",
         "group"),
    # clusters, by the probe
    probe("no multicast", "kBoth = 3", "kBoth = 1", "gemm"),
    probe("empty counts one block", "8 * P::kCluster);", "8);", "gemm"),
    probe("arrival at the own block alone",
          "      if (lane < P::kCluster) ptx::barrier_arrive_remote(ring.empty(read), lane);\n"
          "      store_probe_tile",
          "      if (lane < P::kCluster)\n"
          "        ptx::barrier_arrive_remote(ring.empty(read), ptx::cluster_rank());\n"
          "      store_probe_tile", "gemm"),
    probe("released before it was read",
          "        if (k > 0 && lane < P::kCluster) "
          "ptx::barrier_arrive_remote(ring.empty(read), lane);\n        read = ring.stage;",
          "        read = ring.stage;\n"
          "        if (lane < P::kCluster && k + 1 < blocks_k) "
          "ptx::barrier_arrive_remote(ring.empty(read), lane);", "gemm"),
    probe("both halves into the same place", "ring.b() + rank * (P::kBBytes / 2)", "ring.b()",
          "gemm"),
    probe("no proxy fence before the store", "  ptx::fence_async_shared();\n", "", "gemm"),
    probe("no barrier before the store", "  sync();\n  if (thread == 0) {\n    LK_UNROLL",
          "  if (thread == 0) {\n    LK_UNROLL", "gemm"),
    probe("output staging overwritten", "  if (thread == 0) ptx::tma_store_wait_read<0>();\n", "",
          "gemm"),
    probe("block leaves its cluster",
          "  // Neither block leaves while the other may still signal it.\n"
          "  ptx::cluster_arrive();\n  ptx::cluster_wait();\n", "", "gemm"),
    probe("more registers than there are", "registers_increase<232>", "registers_increase<240>",
          "gemm"),
    probe("epilogue swizzle", "swizzled(row * kRowBytes + chunk * kChunkBytes)",
          "(row * kRowBytes + chunk * kChunkBytes)", "gemm"),
    probe("phase not flipped", "      phase ^= 1;\n    }\n  }", "    }\n  }", "gemm"),
    # flags and tickets, by the probe
    probe("flag before the proxy fence", "ptx::fence_async_global(); ptx::block_sync();",
          "ptx::block_sync();", "relay"),
    probe("reader's proxy fence dropped",
          "ptx::fence_async_global(); ptx::barrier_arrive_expect", "ptx::barrier_arrive_expect",
          "relay"),
    probe("fences of the wrong space", "ptx::fence_async_global(); ptx::block_sync();",
          "ptx::fence_async_shared(); ptx::block_sync();", "relay"),
    probe("flag before the barrier",
          "      ptx::fence_async_global();\n      ptx::block_sync();\n"
          "      if (thread == 0) ptx::store_release",
          "      ptx::fence_async_global();\n"
          "      if (thread == 0) ptx::store_release", "relay"),
    probe("flag of another tile", "ptx::load_acquire(args.flags + item - args.tiles)",
          "ptx::load_acquire(args.flags + (item - args.tiles) / 2)", "relay"),
    probe("consumers claim first", "static_cast<int>(ptx::load_shared_word(claimed));",
          "2 * args.tiles - 1 - static_cast<int>(ptx::load_shared_word(claimed));", "relay"),
    probe("ticket read before all left", "ptx::block_sync();  // the item before", "//", "relay"),
    probe("tile overwritten while stored", "      ptx::tma_store_wait_read<0>();\n    }\n  }",
          "    }\n  }", "relay"),
]  # fmt: skip

# Changes that the suite cannot see, each with the reason.
SURVIVORS = [
    (
        sm90("compiler fence dropped", "ptx::wgmma_commit(); ptx::wgmma_keep(sum); // Loads",
             "ptx::wgmma_commit(); // Loads"),
        "binds the compiler, not the machine: ptxas's remarks are the test of it (tests/gates.py)",
    ),
    (
        sm80("last wait dropped", "  ptx::cp_async_wait<0>();\n\n  if constexpr", "  if constexpr"),
        "benign: every group that is left is empty",
    ),
]  # fmt: skip

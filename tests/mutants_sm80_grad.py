"""Planted bugs of weight_grad on GPUs other than Hopper's, as in mutants.py."""

from __future__ import annotations

from mutants import DROPOUT, Mutant

KERNEL, PLAN = "csrc/cuda/weight_grad_sm80.cuh", "csrc/cuda/weight_grad_plan.cpp"


def grad(name: str, text: str, replacement: str, file: str = KERNEL) -> Mutant:
    return Mutant(name, file, text, replacement, ("weight_grad_sm80",), "grad80")


def host(name: str, text: str, replacement: str) -> Mutant:
    return Mutant(name, PLAN, text, replacement, ("backward",), "grad80")


KILLED = [
    # the ring
    grad("stage of a gradient not waited for", "cp_async_wait<Tile::kStages - 2>",
         "cp_async_wait<Tile::kStages - 1>"),
    grad("stage of a gradient overwritten while read", "ptx::block_sync();", ""),
    grad("next stage of a gradient in the slot being read", "load(next_slot, next)",
         "load(slot, next)"),
    grad("last rows of a chunk left out", "row < at.end; row += Tile::kDepth",
         "row + Tile::kDepth <= at.end; row += Tile::kDepth"),
    grad("rows past the chunk", "left < work.rows ? work.M : row + work.rows", "work.M"),
    # fragments
    grad("narrow rows swizzled as wide ones", "row / kRows & kMask", "row & kMask"),
    grad("rows of a gradient not swizzled", "(chunk ^ (row / kRows & kMask))", "chunk"),
    grad("quadrants of x^T exchanged", "row + lane % 8 + lane / 16 * 8;", "row + lane % 16;"),
    grad("fragment of x^T left as it lay", "a[v] = ptx::transpose_matrix(own[v / 2 + v % 2 * 2]);",
         "a[v] = v == 3 ? own[v] : ptx::transpose_matrix(own[v / 2 + v % 2 * 2]);"),
    grad("quadrants of masked x^T not exchanged", "own[v / 2 + v % 2 * 2]", "own[v]"),
    # the mask
    grad("mask of the first rows of a stage", "below(dropout, row), 0, kept", "dropout, 0, kept"),
    grad("mask of the first stage", "dropout = below(dropout, Tile::kDepth);", ""),
    grad("mask of the first strip", "lane), at.column + warp * 16);", "lane), warp * 16);"),
    grad("bits of the first fragment that straddles", "kept >> 8 * step", "kept"),
    grad("draws of the first fragment that straddles", "draw_any_dropout(below(d, i * 16), 0",
         "draw_any_dropout(d, 0", DROPOUT),
    grad("groups of the first strip", "d.column_group += static_cast<uint32_t>(columns / 4);", "",
         DROPOUT),
    grad("columns of the first strip", "d.col0 += columns;", "", DROPOUT),
    # parts and results
    grad("h of the first ranks of a part", "h, row, at.first, thread",
         "h, row, work.parts[at.part].first, thread"),
    grad("ranks of the next part too", "part.first + part.ranks,", "work.pitch,"),
    grad("first block of a part given to the one before", "first_block <= block",
         "first_block < block"),
    grad("sums by each block of ranks", "work.sums != nullptr && block == 0",
         "work.sums != nullptr"),
    grad("sums of odd rows doubled", "ptx::pack(1.0f, 1.0f, T{})", "ptx::pack(1.0f, 2.0f, T{})"),
    grad("padding of ranks not written", "in_fours(left <", "(left <"),
    grad("gradients past the last column", "column, work.K, 0, ranks - n * 8",
         "column, work.K + 1, 0, ranks - n * 8"),
    # what the kernel is told
    host("blocks of each part numbered from 0",
         "first_block = static_cast<uint32_t>(blocks);", "first_block = 0;"),
    host("16-byte copies of any x", "has_vectors(x, a.M),", "true,"),
    host("mask of the first part for all", "part.ranks, 0, part.dropout}",
         "part.ranks, 0, pass.parts[0].dropout}"),
]  # fmt: skip

SURVIVORS: list[tuple[Mutant, str]] = []

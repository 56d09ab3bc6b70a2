"""Planted bugs of fused_gemm_sm80, as in mutants.py."""

from __future__ import annotations

from mutants import Mutant

GEMM, WORK = "csrc/cuda/fused_gemm_sm80.cuh", "csrc/cuda/fused_gemm_sm80_work.h"
MASKED, PLAN = "csrc/cuda/fused_gemm_masked.cuh", "csrc/cuda/fused_gemm_plan.cpp"


def gemm(name: str, text: str, replacement: str, file: str = GEMM) -> Mutant:
    return Mutant(f"sm80 gemm: {name}", file, text, replacement, ("fused_gemm_sm80",), "gemm80")


def outputs(name: str, text: str, replacement: str, file: str = WORK) -> Mutant:
    return gemm(name, text, replacement, file)._replace(suite="outputs80")


def added(name: str, text: str, replacement: str, file: str = WORK) -> Mutant:
    return gemm(name, text, replacement, file)._replace(suite="sums80")


KILLED = [
    # ring
    gemm("a group too many pending", "ptx::cp_async_wait<Tile::kStages - 2>();",
         "ptx::cp_async_wait<Tile::kStages - 1>();"),
    gemm("stage not waited for", "ptx::cp_async_wait<Tile::kStages - 2>();", ""),
    gemm("stage overwritten while read",
         "ptx::cp_async_wait<Tile::kStages - 2>();\n    ptx::block_sync();",
         "ptx::cp_async_wait<Tile::kStages - 2>();"),
    gemm("empty stages not committed", "at, next, loaded); ptx::cp_async_commit();",
         "at, next, loaded), ptx::cp_async_commit();"),
    gemm("loaded into the slot at hand", "at, next, loaded);", "at, slot, loaded);"),
    gemm("a stage loaded twice", "++loaded;", "loaded += loaded != 2;"),
    gemm("a stage never loaded", "++loaded;", "loaded += loaded == 2 ? 2 : 1;"),
    gemm("slots of loads one too many", "next = next + 1 == Tile::kStages ?",
         "next = next == Tile::kStages ?"),
    gemm("slots read one too few", "slot = slot + 1 == Tile::kStages ?",
         "slot = slot + 2 == Tile::kStages ?"),
    gemm("ring filled one stage short", "i < Tile::kStages - 1; ++i", "i < Tile::kStages - 2; ++i"),
    gemm("last stage not waited for", "if (stage + 1 < all) ring.wait();",
         "if (stage + 2 < all) ring.wait();"),
    gemm("first masked stage not waited for", "if (stage + 1 < all) ring.wait();",
         "if (stage + 1 < plain) ring.wait();"),
    gemm("further masked stages not waited for", "if (--stages == 0) break;\n    ring.wait();",
         "if (--stages == 0) break;"),
    gemm("masked stages past the ring not loaded", "ring.load();\n    ring.advance();\n    if",
         "ring.advance();\n    if"),
    gemm("masked stage stays at hand", "ring.advance();\n    if (--stages", "if (--stages"),
    gemm("y over stages that are read", "ptx::block_sync();  // the ring is free", ""),
    # places in a stage, fragments
    gemm("K-major rows in one bank", "chunk ^ (row / 2 & 3)", "chunk ^ (row & 3)"),
    gemm("MN-major rows in one bank", "chunk ^ (k & 7)", "chunk ^ (k & 3)"),
    gemm("x written elsewhere", "from + k_major_place(row, chunk)",
         "from + k_major_place(row, chunk ^ 1)"),
    gemm("x read unswizzled", "k_major_place(row, step * 2 + at.lane / 16)",
         "row * (kSm80Depth * 2) + (step * 2 + at.lane / 16) * kChunkBytes"),
    gemm("weight over x", "to = from + Tile::kABytes;", "to = from + Tile::kABytes / 2;"),
    gemm("step before again", "at, ring.slot, (step + 1) % kSteps);", "at, ring.slot, step);"),
    gemm("halves of k exchanged", "step * 2 + lane / 8 % 2", "step * 2 + (lane / 8 + 1) % 2"),
    gemm("rows of the first warp", "at.first_row() + m * 16 + at.lane % 16;",
         "m * 16 + at.lane % 16;"),
    gemm("columns of the first warp", "at.first_column() + n * 16;\n  if", "n * 16;\n  if"),
    gemm("fragments of weight exchanged", "f.b[n][0], f.b[n][1]", "f.b[n][0], f.b[n][2]"),
    # tails
    gemm("depth tail of x", "1, out.M, depth, true}", "1, out.M, depth + 8, true}"),
    gemm("row tail of x", "1, out.M, depth, true}", "1, out.M + 1, depth, true}"),
    gemm("columns past N", "{b, b_stride, 1, out.N, depth, true}",
         "{b, b_stride, 1, out.N + 1, depth, true}"),
    gemm("columns past N of an MN-major weight", "{b, b_stride, 1, depth, out.N, true}",
         "{b, b_stride, 1, depth, out.N + 8, true}"),
    gemm("ranks past r", "{b, b_stride, 1, depth, out.N, true}",
         "{b, b_stride, 1, depth + 1, out.N, true}"),
    gemm("LoRA term as deep as K", "depth = frozen ? s.K : s.r;", "depth = s.K;"),
    gemm("last ranks left out", "static_cast<uint32_t>(ceil_div(plan.r, kSm80Depth))",
         "static_cast<uint32_t>(plan.r / kSm80Depth)", WORK),
    gemm("last of the depth left out", "static_cast<uint32_t>(ceil_div(a.K, kSm80Depth))",
         "static_cast<uint32_t>(a.K / kSm80Depth)", WORK),
    # scale
    gemm("sums not divided by the scale", "multiply_sums<Tile>(acc, s.inverse);", ""),
    gemm("masked term scaled twice", "if (scaled) multiply_sums<Tile>(acc, s.scale);",
         "multiply_sums<Tile>(acc, s.scale);"),
    gemm("scale of a masked term forgotten", "kept[m], n, s.scale);", "kept[m], n, 1.0f);"),
    gemm("inverse is the scale", "adapted ? 1.0f / a.scale : 1.0f", "adapted ? a.scale : 1.0f",
         WORK),
    # mask
    gemm("mask not looked at", "s.mask.seed != nullptr && s.r > 0,", "s.r < 0,"),
    gemm("mask rows of the first warp", "s.mask, at.row + at.first_row(), at.lane",
         "s.mask, at.row, at.lane"),
    gemm("mask rows of the first tile", "s.mask, at.row + at.first_row(), at.lane",
         "s.mask, at.first_row(), at.lane"),
    gemm("mask columns of the first warp",
         "static_cast<uint32_t>(at.column) + at.first_column() + n * 16;",
         "static_cast<uint32_t>(at.column) + n * 16;"),
    gemm("mask of the first fragment of rows", "below(dropout, m * 16)", "dropout"),
    gemm("kept bits of the first rows", "term, kept[m], n,", "term, kept[0], n,"),
    gemm("kept bits of a fragment further", "column, at.lane) << 4 * n;",
         "column, at.lane) << 4 * (n ^ 1);"),
    gemm("term multiplied by 0, not selected",
         "if (kept >> (4 * n + e / 2 + 16 * (e % 2)) & 1) sums[e] += scale *",
         "sums[e] += static_cast<float>(kept >> (4 * n + e / 2 + 16 * (e % 2)) & 1) * scale *",
         MASKED),
    gemm("last columns of a masked term left out", "at.first_column() + n * 16 >= ring.out.N",
         "at.first_column() + n * 16 + 16 > ring.out.N"),
    gemm("term of the stage before kept", "acc[m][2 * n], term, kept[m]",
         "acc[m][2 * n], term, stages % 2 == 0 ? 0 : kept[m]"),
    # y
    gemm("y read before it is written", "ptx::block_sync();\n#pragma unroll 1\n  for (uint32_t i = "
         "at.thread", "#pragma unroll 1\n  for (uint32_t i = at.thread"),
    gemm("bias of the first tile", "acc[m][n], out, at.column + column, T{});",
         "acc[m][n], out, column, T{});"),
    gemm("bias past N", "column + 1 < out.N ? ptx", "column < out.N ? ptx"),
    gemm("bias of even columns", "load_global(out.bias + column + 1)",
         "load_global(out.bias + column)"),
    gemm("lower rows of a fragment", "to + 8 * kPitch", "to + 4 * kPitch"),
    gemm("y past the last row", "row >= out.M || column", "row > out.M || column"),
    gemm("y past the last column", "if (column + e < out.N)", "if (column + e <= out.N)"),
    gemm("last chunk of y whole", "out.vectors && column + 8 <= out.N",
         "out.vectors && column + 7 <= out.N"),
    gemm("odd rows of y by chunks", "out.vectors && column", "column"),
    gemm("offset of y of 32 bits", "out.y + row * out.stride + column",
         "out.y + static_cast<int>(row * out.stride) + column"),
    # tiles
    gemm("rows as if in one group", "int64_t{place.pair} * Tile::kM",
         "int64_t{blockIdx.x % work.raster.pairs} * Tile::kM"),
    gemm("tiles of two row blocks", "kernel == Kernel::sm90 ? 2 * m : m", "2 * m",
         PLAN)._replace(sources=("forward",)),
    outputs("first column of an output in the one before", "column >= ends[output]",
            "column > ends[output]"),
    outputs("column counted from the first output's",
            "if (output > 0) column -= ends[output - 1];", ""),
    outputs("every output as wide as the first", "end += plan.raster.columns",
            "end += group.plans[0].raster.columns"),
    outputs("every output computed as the first", "output * work.segments_of_output + s", "s",
            GEMM),
    outputs("every output stored as the first", "store_sm80_tile<T, Tile>(acc, work.out[output]",
            "store_sm80_tile<T, Tile>(acc, work.out[0]", GEMM),
    outputs("outputs added up", "group.added ? work.count : 1", "work.count"),
    added("products not added up", "group.added ? work.count : 1", "1"),
    added("last product left out", "s < work.segments_of_output; ++s",
          "s + 1 < work.segments_of_output; ++s", GEMM),
    added("sums of the products before scaled", "multiply_sums<Tile>(acc, s.inverse);", "", GEMM),
    added("product of the first for all", "sm80_segment_of(group.args[i], group.plans[i], "
          "workspace);", "sm80_segment_of(group.args[0], group.plans[0], workspace);"),
    added("mask of the first product for all", "sm80_segment_of(group.args[i], group.plans[i], "
          "workspace);", "sm80_segment_of(group.args[i], group.plans[i], workspace), "
          "work.segment[i].mask = group.args[0].dropout;"),
    added("stages of the next product over those that are read",
          "ptx::block_sync();  // the ring is free", "", GEMM),
]  # fmt: skip

# Changes that the suite cannot see, each with the reason.
SURVIVORS = [
    (
        gemm("last wait dropped", "ptx::cp_async_wait<0>();\n  ptx::block_sync();",
             "ptx::block_sync();"),
        "benign: every group that is left is empty",
    ),
    (
        gemm("masked term past N", "if (at.column + at.first_column() + n * 16 >= ring.out.N) "
             "break;", ""),
        "benign: sums past the last column are not stored; the branch is for ptxas",
    ),
    (
        gemm("rows of y in one bank", "kPitch = Tile::kN * 2 + kChunkBytes;",
             "kPitch = Tile::kN * 2;"),
        "costs time alone: conflicts are counted of ldmatrix and stmatrix, not of st.shared",
    ),
]  # fmt: skip

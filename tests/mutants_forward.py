"""Planted bugs of the kernels that make y, as in mutants.py."""

from __future__ import annotations

from mutants import DROPOUT, STORE, Mutant

RING, TILE_STORE = "csrc/cuda/fused_gemm_ring.cuh", "csrc/cuda/fused_gemm_tile.cuh"
GEMM, FORWARD = "csrc/cuda/fused_gemm_sm90.cuh", "csrc/cuda/forward_sm90.cuh"
DROPPED, PACK = "csrc/cuda/dropped_tile.cuh", "csrc/cuda/pack.cuh"
CLAIMS = "csrc/cuda/claims.cuh"
GEMM_PLAN, GEMM_HEADER = "csrc/cuda/fused_gemm_plan.cpp", "csrc/cuda/fused_gemm_plan.h"
FORWARD_PLAN, FORWARD_HEADER = "csrc/cuda/forward_plan.cpp", "csrc/cuda/forward_plan.h"
RASTER, OPERAND = "csrc/cuda/raster.h", "csrc/cuda/tma_operand.h"
WORK = "csrc/cuda/fused_gemm_work.h"
DOWN_SM90 = "csrc/cuda/down_proj_sm90.cuh"


def kernel(file: str, name: str, text: str, replacement: str, *more: str) -> Mutant:
    return Mutant(name, file, text, replacement, ("forward_sm90", *more), "forward")


def host(file: str, name: str, text: str, replacement: str) -> Mutant:
    sources = ("forward",) if file.endswith(".cpp") else ("forward_sm90", "forward")
    return Mutant(name, file, text, replacement, sources, "forward")


KILLED = [
    # ring
    kernel(RING, "W not multicast", "kBoth = 3", "kBoth = 1"),
    kernel(RING, "halves of W in one place", "ring.b() + rank * kHalf * kRowBytes, b_map, full, "
           "static_cast<int>(k),", "ring.b(), b_map, full, static_cast<int>(k),"),
    kernel(RING, "both blocks load the same half", "static_cast<int>(column + rank * kHalf), kBoth",
           "static_cast<int>(column), kBoth"),
    kernel(RING, "halves of a panel exchanged", "static_cast<int>(k + rank * kHalf), kBoth",
           "static_cast<int>(k + (1 - rank) * kHalf), kBoth"),
    kernel(RING, "every panel is the first", "static_cast<int>(column + p * 64)",
           "static_cast<int>(column)"),
    kernel(RING, "empty of one block", "4 * Tile::kConsumers * Tile::kCluster",
           "4 * Tile::kConsumers"),
    kernel(RING, "release of one block", "if (lane < Tile::kCluster) "
           "ptx::barrier_arrive_remote(empty(previous), lane);",
           "if (lane < Tile::kCluster) "
           "ptx::barrier_arrive_remote(empty(previous), ptx::cluster_rank());"),
    kernel(RING, "stage in use released", "const uint32_t previous = (stage == 0 ? Tile::kStages : "
           "stage) - 1;", "const uint32_t previous = stage;"),
    kernel(RING, "phase kept", "      phase ^= 1;\n    }", "    }"),
    kernel(RING, "too few bytes", "ring.expect(Tile::kABytes + kN * kRowBytes)",
           "ring.expect(Tile::kABytes + kN * kRowBytes / 2)"),
    kernel(RING, "step zero restarts", "ptx::wgmma<T, 0, kMnMajor>(acc, a, b, true);",
           "ptx::wgmma<T, 0, kMnMajor>(acc, a, b, step > 0);"),
    kernel(TILE_STORE, "old sums kept", "LK_UNROLL\n  for (float& a : acc) a = 0;\n", ""),
    kernel(RING, "wait of the frozen loop dropped", "  ptx::wgmma_wait<1>();  // the stage before",
           "  // the stage before"),
    kernel(RING, "rank loop one step short", "first + step < steps", "first + step + 1 < steps"),
    kernel(RING, "last wait dropped", "  ptx::wgmma_wait<0>();\n  ptx::wgmma_keep(acc);\n  ring",
           "  ptx::wgmma_keep(acc);\n  ring"),
    kernel(RING, "last stage kept", "ptx::wgmma_keep(acc); ring.release_previous(lane);",
           "ptx::wgmma_keep(acc);"),
    kernel(RING, "both groups take the first rows", "ring.a() + group * kPanel + step",
           "ring.a() + step"),
    kernel(RING, "panels taken as contiguous", "step * kMnMajorStep, kPanel)",
           "step * kMnMajorStep, kPanel / 2)"),
    kernel(RING, "panels of a narrower tile", "p < kN / 64;", "p < Tile::kStaged;"),
    # epilogue
    kernel(TILE_STORE, "staging overwritten", "if (thread == 0) "
           "ptx::tma_store_wait_read<kStaged - 1>();", ""),
    kernel(TILE_STORE, "staging waited for one panel late", "tma_store_wait_read<kStaged - 1>",
           "tma_store_wait_read<kStaged>"),
    kernel(TILE_STORE, "others not told of free staging",
           "ptx::tma_store_wait_read<kStaged - 1>();\n"
           "    sync_warpgroup(group);", "ptx::tma_store_wait_read<kStaged - 1>();"),
    kernel(TILE_STORE, "stored before all wrote", "ptx::fence_async_shared();\n"
           "    sync_warpgroup(group);", "ptx::fence_async_shared();"),
    kernel(TILE_STORE, "stored without a fence", "    ptx::fence_async_shared();\n", ""),
    kernel(TILE_STORE, "both groups at one barrier", "    ptx::named_barrier_sync<2>(128);",
           "    ptx::named_barrier_sync<1>(128);"),
    kernel(TILE_STORE, "staging not swizzled", "ptx::store_matrix_x4(panel + swizzled(offset), r)",
           "ptx::store_matrix_x4(panel + offset, r)"),
    kernel(TILE_STORE, "ordinary stores not swizzled", "panel + swizzled(i * 4)", "panel + i * 4"),
    kernel(TILE_STORE, "ordinary stores past the last column", "if (c + 1 < out.N) ptx::store",
           "ptx::store"),
    kernel(TILE_STORE, "ordinary stores past the last row", "r >= out.M || c", "c"),
    kernel(TILE_STORE, "bias past the last column", "column + 1 < out.N ? ptx", "true ? ptx"),
    kernel(TILE_STORE, "bias of the first panel", "ring.bias(group) + p * 128", "ring.bias(group)"),
    kernel(TILE_STORE, "one bias for both groups", "ring.bias(group) + thread * 4",
           "ring.bias(0) + thread * 4"),
    kernel(TILE_STORE, "bias of even columns twice",
           "acc[4 * n + 2] += low, acc[4 * n + 3] += high",
           "acc[4 * n + 2] += low, acc[4 * n + 3] += low"),
    kernel(TILE_STORE, "scale of the LoRA term taken off alone",
           "if (scaled) multiply_by(acc, segment.scale);", ""),
    kernel(TILE_STORE, "scaled before it is there", "    ptx::wgmma_wait<0>();\n"
           "    ptx::wgmma_keep(acc);\n    multiply_by", "    multiply_by"),
    kernel(TILE_STORE, "both groups store the first rows", "out, row + group * 64, column",
           "out, row, column"),
    # fused_gemm: overlap with down_proj, drain
    kernel(GEMM, "h read before it is there",
           "        if (!waited) ptx::grid_wait_dependency();\n", ""),
    kernel(GEMM, "left before y is stored",
           "    if (thread % 128 == 0) ptx::tma_store_wait<0>();\n", ""),
    kernel(GEMM, "block of fused_gemm leaves its cluster",
           "  // Neither block leaves while the other may still signal it.\n"
           "  ptx::cluster_arrive();\n  ptx::cluster_wait();\n", ""),
    # forward: flags, claims
    kernel(FORWARD, "flag not waited for",
           "      wait_for_flag(work.flags + row_block);\n", ""),
    kernel(FORWARD, "ticket taken before it is zero",
           "    ptx::grid_wait_dependency();  // ticket and flags are zero\n", ""),
    kernel(PACK, "one block of a row copied", "column += kPackThreads", "column += job.width"),
    kernel(PACK, "last flag not zeroed", "i < count;", "i < count - 1;"),
    kernel(FORWARD, "flag of the other block", "wait_for_flag(work.flags + row_block)",
           "wait_for_flag(work.flags + (row_block ^ 1))"),
    kernel(CLAIMS, "reader does not fence", "  ptx::fence_async_global();  // TMA is",
           "  // TMA is"),
    kernel(FORWARD, "writers do not fence", "  ptx::fence_async_global();  // TMA of",
           "  // TMA of"),
    kernel(FORWARD, "flag of one group alone",
           "  ptx::named_barrier_sync<3>(128 * Ring::Tile::kConsumers);\n", ""),
    kernel(FORWARD, "flag too early", "ptx::named_barrier_sync<3>(128 * Ring::Tile::kConsumers);\n"
           "  if (group == 0 && thread == 0) ptx::store_release(work.flags + row_block, 1);",
           "if (group == 0 && thread == 0) ptx::store_release(work.flags + row_block, 1);\n"
           "  ptx::named_barrier_sync<3>(128 * Ring::Tile::kConsumers);"),
    kernel(CLAIMS, "claim overwritten", "      if (turn > 0) ptx::barrier_wait(heard(), "
           "(turn - 1) & 1);\n", ""),
    kernel(CLAIMS, "claim heard in the wrong phase", "(turn - 1) & 1", "turn & 1"),
    kernel(CLAIMS, "claim waited for in block scope",
           "ptx::barrier_wait_cluster(told(), turn & 1)", "ptx::barrier_wait(told(), turn & 1)"),
    kernel(CLAIMS, "claim not expected", "      ptx::barrier_arrive_expect(told(), 4);",
           "      ptx::barrier_arrive(told());"),
    kernel(CLAIMS, "item taken twice", "ptx::atomic_add(counter, 1)",
           "ptx::atomic_add(counter, ticket & 1)"),
    kernel(CLAIMS, "item skipped", "ptx::atomic_add(counter, 1)", "ptx::atomic_add(counter, 2)"),
    kernel(FORWARD, "item written before its stage is free", "    ring.acquire();\n"
           "    ptx::store_shared_word", "    ptx::store_shared_word"),
    kernel(FORWARD, "h of the pair's first block", "work.gemm.blocks_k, row, 0)",
           "work.gemm.blocks_k, at.pair * 256, 0)"),
    kernel(FORWARD, "every pair of a chain is its first", "row_block + p * Tile::kCluster",
           "row_block"),
    kernel(FORWARD, "next item never asked for", "        if (rank == 0) claims.ask();\n"
           "        wait_for_flag", "        wait_for_flag"),
    kernel(FORWARD, "mask of the first block's rows", "int64_t{row_block} * Ring::Tile::kM + group",
           "int64_t{row_block / 2} * Ring::Tile::kM + group", ),
    kernel(FORWARD, "odd stages of h forgotten", "even[4 * n + e] + odd[4 * n + e]",
           "even[4 * n + e]"),
    kernel(FORWARD, "odd stages of h from the next place", "multiply(odd, block + 1)",
           "multiply(odd, block + 2)"),
    kernel(FORWARD, "last odd stage of h left out", "block + 1 < blocks", "block + 2 < blocks"),
    kernel(FORWARD, "stage of h released while read",
           "  ptx::wgmma_wait<1>();  // the other", "  // the other"),
    kernel(FORWARD, "stage of h kept", "  if (block > 0) ring.release_previous(lane);\n"
           "  ring.advance();", "  ring.advance();"),
    kernel(DROPPED, "mask of the wrong column",
           "apply_dropout(a[j], dropout, column + step * kMmaDepth, kept >> 8 * step)",
           "apply_dropout(a[j], dropout, column + group * kMmaDepth, kept >> 8 * step)",
           "down_proj_sm90"),
    kernel(DROPOUT, "unaligned mask of the wrong column", "d.col0 + col + lane % 4 * 2",
           "d.col0 + lane % 4 * 2", "down_proj_sm90"),
    kernel(DROPOUT, "columns of a shard forgotten", "column_group(first_col + lane % 4 * 2)",
           "column_group(lane % 4 * 2)", "down_proj_sm90", "down_proj_sm80"),
    kernel(STORE, "scale of h forgotten", "sum[2 * half + 1] * args.scale", "sum[2 * half + 1]",
           "down_proj_sm90", "down_proj_sm80"),
    # copies
    kernel(PACK, "padding not zero", "column < job.columns ?", "true ?"),
    kernel(PACK, "grid stride forgotten", "piece += gridDim.x", "piece += gridDim.x * 2"),
    kernel(PACK, "every piece is the first", "piece % pieces * kPieceColumns", "0"),
    # host
    host(RASTER, "last group as high as the others",
         "number + 1 < groups_ ? group : pairs - number * group", "group"),
    host(RASTER, "chains of the group at hand", "chain_at((at + 1) * group, rows_of(at + 1), item)",
         "chain_at(at * group, rows_of(at), item)"),
    host(RASTER, "last chain as long as the others", "left < chain ? left : chain", "chain"),
    host(OPERAND, "stride of the packed row", "columns > 0 ? (columns + 7) / 8 * 8 : 8",
         "columns > 0 ? columns : 8"),
    host(OPERAND, "odd strides taken as good", "(rows == 1 || m.row_stride % 8 == 0)", "true"),
    host(GEMM_PLAN, "TMA past the end of a row", "args.N % 8 == 0 && !tma_operand",
         "!tma_operand"),
    host(GEMM_PLAN, "packed operands in one place", "offset += operand->bytes();",
         "offset += operand->bytes() / 2;"),
    host(GEMM_HEADER, "whole boxes of both blocks", ": plan.tile_n / 2;", ": plan.tile_n;"),
    host(FORWARD_PLAN, "flags for one block of two", "2 * int64_t{plan.raster.pairs}",
         "int64_t{plan.raster.pairs}"),
    host(FORWARD_PLAN, "rank 128 in a tile of 64", "args.down.r > kForwardRanks[0]", "false"),
    host(FORWARD_HEADER, "h not copied out", "after.count > 0", "after.count > 1"),
    host(WORK, "half a step of ranks forgotten", "ceil_div(plan.r, kMmaDepth)",
         "plan.r / kMmaDepth"),
    host(WORK, "half a stage of depth forgotten", "ceil_div(depth, kRowElements)",
         "depth / kRowElements"),
]  # fmt: skip

SURVIVORS = [
    (
        kernel(RING, "rank loop one step long", "step < kSteps && first + step < steps",
               "step < kSteps && first + step < steps + 1"),
        "benign: past the rank a stage is zero",
    ),
]  # fmt: skip

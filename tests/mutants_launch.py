"""Planted bugs of the launchers of csrc/cuda, as in mutants.py."""

from __future__ import annotations

from mutants import Mutant


def launch(file: str, source: str, suite: str, name: str, text: str, replacement: str) -> Mutant:
    return Mutant(f"launch: {name}", f"csrc/cuda/{file}", text, replacement, (source,), suite)


KILLED = [
    launch("decode.cu", "decode", "decode", "no clusters of parts of K",
           "launch_clusters(plan.work.splits, kernel,", "launch_clusters(1, kernel,"),
    launch("launch.h", "decode", "decode", "shared memory not asked for",
           "shared_bytes > 48 << 10", "shared_bytes > 48 << 20"),
    launch("launch.h", "decode", "decode", "clusters one too large",
           "{static_cast<unsigned>(cluster), 1, 1}", "{static_cast<unsigned>(cluster) + 1, 1, 1}"),
    launch("launch.h", "decode", "decode", "another stream", "config.stream = stream;",
           "config.stream = nullptr;"),
    launch("decode.cu", "decode", "decode", "last tile of a grid left out",
           "plan.tiles * plan.work.splits", "(plan.tiles - 1) * plan.work.splits"),
    launch("forward_sm90.cu", "forward_sm90", "forward", "A for h", "maps.weight, a_map, maps.h,",
           "maps.weight, maps.h, a_map,"),
    launch("fused_gemm_sm90.cu", "forward_sm90", "forward", "a block for a cluster",
           "dim3(2 * group.clusters)", "dim3(group.clusters)"),
    launch("fused_gemm_sm80.cu", "fused_gemm_sm80", "gemm80", "a tile left out",
           "dim3(group.raster.items())", "dim3(group.raster.items() - 1)"),
    launch("encode_tensor_map.cpp", "launch", "sm90", "strides in elements",
           "static_cast<cuuint64_t>(spec.row_stride) * 2",
           "static_cast<cuuint64_t>(spec.row_stride)"),
    launch("encode_tensor_map.cpp", "launch", "sm90", "boxes with rows for columns",
           "{kRowElements, static_cast<cuuint32_t>(spec.box_rows)}",
           "{static_cast<cuuint32_t>(spec.box_rows), kRowElements}"),
    launch("encode_tensor_map.cpp", "launch", "sm90", "half the swizzle",
           "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B"),
    launch("encode_tensor_map.cpp", "launch", "forward", "h taken for B",
           "encode_tensor_map(specs.up, &maps->up)", "encode_tensor_map(specs.h, &maps->up)"),
    launch("pack.cu", "forward_sm90", "forward", "first copy alone",
           "static_cast<unsigned>(jobs.count)", "1u"),
    launch("stream_launcher.h", "forward", "forward", "fused_gemm early behind copies",
           "launch_fused_gemm_sm90(group, workspace, early, stream)",
           "launch_fused_gemm_sm90(group, workspace, true, stream)"),
    launch("weight_grad.h", "weight_grad_sm90", "passes", "chunks and splits exchanged",
           "plan.kernel == Kernel::sm90 ? dim3(chunks, beside)",
           "plan.kernel != Kernel::sm90 ? dim3(chunks, beside)"),
    launch("down_proj.h", "down_proj_sm80", "sm80", "one block of ranks",
           "plan.blocks * plan.rank_blocks", "plan.blocks"),
    launch("reduce.cu", "weight_grad_sm90", "passes", "first sum alone",
           "static_cast<unsigned>(jobs.count)", "1u"),
]  # fmt: skip

SURVIVORS = [
    (
        launch("launch.h", "forward_sm90", "forward", "nothing starts early", "if (early) {",
               "if (false) {"),
        "benign: a launch waits for the end of the one ahead of it, which only takes longer",
    ),
]  # fmt: skip

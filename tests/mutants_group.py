"""Planted bugs of projections that share x, as in mutants.py: outputs side by side in "forward",
products added up in "backward"."""

from __future__ import annotations

from mutants import Mutant
from mutants_forward import GEMM, GEMM_HEADER, GEMM_PLAN, TILE_STORE, WORK

FORWARD, FORWARD_HEADER = "csrc/cuda/forward_group_plan.cpp", "csrc/cuda/forward_group_plan.h"
BACKWARD, BACKWARD_HEADER = "csrc/cuda/backward_group_plan.cpp", "csrc/cuda/backward_group_plan.h"


def forward(file: str, name: str, text: str, replacement: str, *sources: str) -> Mutant:
    return Mutant(name, file, text, replacement, sources or ("forward_sm90",), "forward_group")


def backward(file: str, name: str, text: str, replacement: str, *sources: str) -> Mutant:
    return Mutant(name, file, text, replacement, sources or ("forward_sm90",), "backward_group")


def host(file: str, name: str, text: str, replacement: str) -> Mutant:
    suite = "forward_group" if file in (FORWARD, FORWARD_HEADER) else "backward_group"
    return Mutant(name, file, text, replacement, ("group",), suite)


KILLED = [
    # which output a tile is of
    forward(WORK, "first column of an output in the one before", "column >= ends[output]",
            "column > ends[output]"),
    forward(WORK, "column counted from the first output's",
            "if (output > 0) column -= ends[output - 1];", ""),
    forward(WORK, "column counted from the second output's",
            "column -= ends[output - 1];", "column -= ends[0];"),
    forward(WORK, "every output as wide as the first", "end += group.plans[i].raster.columns",
            "end += group.plans[0].raster.columns"),
    forward(WORK, "outputs added up", "group.added ? work.count : 1", "work.count"),
    backward(WORK, "products not added up", "group.added ? work.count : 1", "1"),
    forward(WORK, "bias and rows of the first output",
            "output_of(group.args[i], group.plans[i], workspace)",
            "output_of(group.args[0], group.plans[0], workspace)"),
    forward(GEMM, "every output stored as the first", "&maps.each[at.output].y", "&maps.each[0].y"),
    forward(GEMM, "bias of another output", "work.out[at.output],",
            "work.out[(at.output + 1) % 3],"),
    forward(GEMM, "every output computed as the first", "work.segment + at.first, at.count",
            "work.segment, at.count"),
    # products of a tile
    backward(GEMM, "every product loaded from the first's maps",
             "= maps.each[s];\n      load_blocks", "= maps.each[at.first];\n      load_blocks"),
    backward(GEMM, "stages of the first product for all", "= work.segment[s];",
             "= work.segment[at.first];"),
    backward(GEMM, "ranks of the first product for all", "load_blocks<Tile::kN, kMnMajor>(ring, "
             "&map.h, &map.up, segment.blocks_r,",
             "load_blocks<Tile::kN, kMnMajor>(ring, &maps.each[at.first].h, "
             "&maps.each[at.first].up, segment.blocks_r,"),
    backward(GEMM, "h of the first product read before it is there",
             "if (!waited) ptx::grid_wait", "if (s > 0) ptx::grid_wait"),
    backward(WORK, "every product as deep as the first",
             "segment_of(group.args[i], group.plans[i])",
             "segment_of(group.args[0], group.plans[0])"),
    backward(WORK, "scale of the first product for all",
             "segment_of(group.args[i], group.plans[i]);",
             "segment_of(group.args[i], group.plans[i]);\n    "
             "segment.scale = work.segment[0].scale, segment.inverse = work.segment[0].inverse;"),
    backward(WORK, "mask of the first product for all",
             "segment.mask.seed == nullptr) segment.mask = group.mask_of_none();",
             "true) segment.mask = group.args[0].dropout;"),
    backward(TILE_STORE, "sums of the products before dropped",
             "const bool scaled = !kMasked && segment.scale != 1.0f;",
             "const bool scaled = !kMasked && segment.scale != 1.0f;\n  multiply_by(acc, 0.0f);"),
    backward(TILE_STORE, "sums of the products before scaled", "multiply_by(acc, segment.inverse);",
             ""),
    backward(TILE_STORE, "product not finished before the next",
             "finish_product(acc, ring, lane);", ""),
    backward(TILE_STORE, "last stage of a product kept", "finish_product(acc, ring, lane);",
             "ptx::wgmma_wait<0>();"),
    backward(GEMM_HEADER, "mask of none drops as others do", "args[i].dropout.seed_len, 0};",
             "args[i].dropout.seed_len, args[i].dropout.threshold};"),
    backward(WORK, "no mask for a product without", "segment.mask.seed == nullptr) segment",
             "false) segment"),
    backward(WORK, "mask of none for all", "segment.mask.seed == nullptr) segment.mask",
             "true) segment.mask"),
    # plan of the grid
    forward(GEMM_PLAN, "majors differ", "again |= group->plans[i].mn_major && !each.mn_major",
            "again |= false && !each.mn_major", "forward"),
    forward(GEMM_PLAN, "columns of the first output for all", "ceil_div(args[i].N, tile_n)",
            "ceil_div(args[0].N, tile_n)", "forward"),
    forward(GEMM_PLAN, "tiles of the first output alone",
            "group->raster = raster_of(outputs, tile, request.group);",
            "group->raster = group->plans[0].raster;", "forward"),
    # forward
    host(FORWARD_HEADER, "early behind copies alone",
         "adapted |= plan.alone[i].kernel != Kernel::none;", "adapted |= args[i].down.r > 0;"),
    host(FORWARD, "h made twice", "plan.joined[plan.joined_count++] = i;\n  else\n",
         "plan.joined[plan.joined_count++] = i;\n"),
    host(FORWARD_HEADER, "last h not made", "launcher.down_proj_group(joined, plan.joined_count,",
         "launcher.down_proj_group(joined, plan.joined_count - 1,"),
    host(FORWARD_HEADER, "A of another projection packed", "before.add(plan.lora_a[plan.joined[i]]",
         "before.add(plan.lora_a[i]"),
    host(FORWARD_HEADER, "x of all h not copied", "before.add(plan.x, workspace);", ""),
    host(FORWARD_HEADER, "h of a group not copied out", "if (plan.h_padded[i])\n      after",
         "if (false)\n      after"),
    host(FORWARD_HEADER, "copied out from another h", "{each[i].h,           each[i].M",
         "{each[0].h, each[i].M"),
    host(FORWARD, "padded h over one another", "plan.h_offset[i] = reserve(args[i].down.M * "
         "ceil_div(args[i].down.r, 8) * 16);", "reserve(args[i].down.M * "
         "ceil_div(args[i].down.r, 8) * 16), plan.h_offset[i] = plan.x.bytes();"),
    host(FORWARD_HEADER, "h without a mask dropped as others",
         "joined[i].dropout.seed_len, 0};",
         "joined[i].dropout.seed_len, joined[i].dropout.threshold};"),
    host(FORWARD_HEADER, "h of another projection added", "each[plan.outputs[i]].h;", "each[i].h;"),
    host(FORWARD, "operands of a group in one place", "o->offset = reserve(o->bytes());",
         "o->offset = reserve(o->bytes()), o->offset = gemm.weight.offset;"),
    host(FORWARD, "A over the operands of y", "a.offset = reserve(a.bytes());",
         "a.offset = plan.workspace_bytes;"),
    # backward
    host(BACKWARD_HEADER, "gaps not zeroed", "error == 0 && plan.has_gaps", "false"),
    host(BACKWARD_HEADER, "gaps of the first rows zeroed", "args->M * plan.width / 2",
         "args->M * plan.width / 4"),
    host(BACKWARD, "dh over one another", "plan.first[i] = plan.width;", "plan.first[i] = 0;"),
    host(BACKWARD, "dh a rank too close", "plan.width += padded(args[i].r);",
         "plan.width += args[i].r / 8 * 8;"),
    host(BACKWARD, "dA by the ranks of the first", "{column, a.r, a.da", "{0, a.r, a.da"),
    host(BACKWARD, "dA masked as the first", "a.masked_scale, a.dropout};",
         "a.masked_scale, args->dropout};"),
    host(BACKWARD, "dA scaled as the first", "a.masked_scale, a.dropout};",
         "args->masked_scale, a.dropout};"),
    host(BACKWARD, "dA of all where the first asks", "!a.need_a || a.r == 0",
         "!args->need_a || a.r == 0"),
    host(BACKWARD_HEADER, "sums of all dh after dx", "first.add(down_job", "last.add(down_job"),
    host(BACKWARD_HEADER, "dx from the dh of the first",
         "gemm.args[i].h = plan.dh(workspace, i, dtype)",
         "gemm.args[i].h = plan.dh(workspace, 0, dtype)"),
    host(BACKWARD_HEADER, "dh of a launch of its own in the first's place",
         "plan.dy[i].at(workspace), plan.dh(workspace, i, dtype)",
         "plan.dy[i].at(workspace), plan.dh(workspace, 0, dtype)"),
    host(BACKWARD, "dy of the first copied for all", "{&plan.dy[i], &plan.dy_pass[i].h,",
         "{&plan.dy[0], &plan.dy_pass[i].h,"),
    host(BACKWARD, "operands of a dy pass in one place",
         "{&pass.h, &pass.down}) o->offset = reserve(o->bytes());",
         "{&pass.h, &pass.down}) o->offset = end;"),
    host(BACKWARD, "dx reads dy as it lay", "gemm.x = plan.dy[i];", ""),
    host(BACKWARD, "x of dA not copied", "jobs.add(plan.x_passes[0].plan.x, workspace);",
         ";"),
    host(BACKWARD, "partials of all dy passes in one place", "end = place_partials(dy_pass_of",
         "place_partials(dy_pass_of"),
]  # fmt: skip

SURVIVORS: list[tuple[Mutant, str]] = []

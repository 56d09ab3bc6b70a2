"""Planted bugs in the Triton kernels, run in Triton's interpreter, and the tests that must notice.

What only a GPU shows, such as a missing mask of a load, is not here: the interpreter's memory is
NumPy's.
"""

from __future__ import annotations

from mutants_python import PackageMutant


def of(file: str, tests: str):
    """Makes mutants of one file, of whom `tests` expect the same unless they say otherwise."""

    def mutant(name: str, text: str, replacement: str, own: str = "") -> PackageMutant:
        path, stem = f"lora_kernels/triton_kernels/{file}", file.removesuffix(".py")
        return PackageMutant(f"triton {stem}: {name}", path, text, replacement, own or tests)

    return mutant


def kernel(name: str, more: str = "") -> str:
    return f"test_kernels.py::test_{name} -k 'triton and fp32{more}'"


MASKS = "test_triton.py::test_mask_is_alike_in_all_three"
GEMM_MASKS = "test_triton.py::test_mask_is_bit_identical"
KINDS = "test_triton.py::test_kinds_of_gemm"
BACKWARD = "test_lora_linear.py::test_c1_c2_large -k 'triton and fp16'"
SUBSETS = "test_faults_shapes.py::test_fault_19_requires_grad_subsets -k triton"
MANY_TILES = "test_triton.py::test_one_read_of_many_tiles"
ONE_READ = "test_lora_linear.py::test_c1_every_shape -k 'triton and fp16 and depth_past_block'"
SPLIT = "test_triton.py::test_split_sums_are_right"
BAD = "test_faults_values.py -k 'triton and vanishes'"
BIAS = "test_lora_linear.py::test_a_strided_bias -k triton"
MIXED = "test_lora_linear.py::test_adapters_of_two_dtypes -k triton"

EDGES = "test_triton_edges.py"
ONCE = f"{EDGES} -k rounded_once"
WINDOWS = f"{EDGES} -k windows"
TILES = f"{EDGES} -k many_tiles"
WIDTHS = f"{EDGES} -k as_wide"
FAR = "test_triton.py -k fault_20"

down = of("down_proj.py", kernel("down_proj"))
gemm = of("fused_gemm.py", kernel("fused_gemm"))
grad = of("weight_grad.py", kernel("weight_grad"))
both = of("weight_grad.py", "test_triton.py::test_same_bits_every_time")
mask = of("dropout.py", MASKS)
ranks = of("ranks.py", kernel("down_proj"))
reduce = of("reduce.py", BACKWARD)
flow = of("flow.py", BACKWARD)
configs = of("configs.py", "test_triton.py::test_split_covers_the_sum")

KILLED = [
    down("rows not shifted to the blocks", "rows = row - row0 + tl.arange(0, ROWS)",
         "rows = row + tl.arange(0, ROWS)"),
    down("columns not shifted to the blocks", "cols = first - col0 + tl.arange(0, DEPTH)",
         "cols = first + tl.arange(0, DEPTH)"),
    down("last columns behind the shift lost", "span, k + col0), DEPTH)", "span, k), DEPTH)",
         MASKS),
    down("column stride ignored", "x_tile += DEPTH * tl.cast(x_col, tl.int64)", "x_tile += DEPTH",
         "test_lora_linear.py::test_fault_17_any_strides -k 'triton and large and fp32 and x-'"),
    down("mask of the first step", "seed, row, depth, threshold, MASK",
         "seed, row, 0, threshold, MASK"),
    down("h unscaled", "stored = (total * scale)", "stored = total"),
    down("h scaled twice", "threshold, scale if splits == 1 else 1.0,", "threshold, scale,", SPLIT),
    down("no 1/q in h", "inverse_keep(threshold) if mask", "1.0 if mask"),
    down("dropped by multiplying", "tl.where(keep, left, tl.zeros_like(left))",
         "left * keep.to(left.dtype)", BAD),
    gemm("mask of another tile", "seed, row, col, threshold, MASK, ROWS, COLS",
         "seed, col, row, threshold, MASK, ROWS, COLS", GEMM_MASKS),
    gemm("group of row tiles past the last", "tl.minimum(row_tiles - first, GROUP)", "GROUP",
         KINDS),
    gemm("more ranks than there are", "inside = ranks < r - first", "inside = ranks < r"),
    gemm("up projection of the first ranks", "up_tile += RANK * tl.cast(up_col, tl.int64)", ""),
    gemm("term unscaled", "term *= scale", ""),
    gemm("weight stride of columns ignored", "w_tile += DEPTH * tl.cast(weight_col, tl.int64)",
         "w_tile += DEPTH", KINDS),
    gemm("bias stride ignored", "cols.to(tl.int64) * bias_step", "cols.to(tl.int64)", BIAS),
    gemm("bias lost", "BIAS=bias is not None", "BIAS=False"),
    gemm("no 1/q in dx", "inverse_keep(threshold) if mask", "1.0 if mask"),
    gemm("described tiles of the first columns", "row - row0, col - col0, k, K_MAJOR",
         "row - row0, 0, k, K_MAJOR", KINDS),
    gemm("described weight not turned", "weight.load([depth, col])",
         "tl.trans(weight.load([depth, col]))", KINDS),
    gemm("term dropped by multiplying", "tl.where(keep, term, 0.0)", "term * keep", BAD),
    gemm("y of 16 bits before the bias", "total += added.to(tl.float32)[None, :]",
         "total = total.to(y.dtype.element_ty).to(tl.float32) + added.to(tl.float32)[None, :]",
         kernel("fused_gemm").replace("fp32", "bf16")),
    gemm("persistent programs stop early", "row_tiles * col_tiles, tl.num_programs(0)",
         "tl.minimum(row_tiles * col_tiles, tl.num_programs(0)), tl.num_programs(0)", KINDS),
    grad("rows not shifted to the blocks", "rows = first - row0 + tl.arange(0, ROWS)",
         "rows = first + tl.arange(0, ROWS)"),
    grad("columns not shifted to the blocks", "cols = col - col0 + tl.arange(0, COLS)",
         "cols = col + tl.arange(0, COLS)"),
    grad("mask not turned", "tl.where(tl.trans(keep), left", "tl.where(keep, left"),
    grad("scaled twice", "threshold, scale if chunks == 1 else 1.0,", "threshold, scale,", SPLIT),
    grad("h of the first rows", "h_tile += ROWS * h_row", ""),
    grad("transposed or not", "*((1, r) if transpose else (k, 1)), r * k", "*(k, 1), r * k"),
    grad("never wide", "(r, k), torch.float32 if wide else x.dtype", "(r, k), x.dtype",
         "test_kernels.py::test_weight_grad -k 'triton and fp16 and wide and 7-'"),
    grad("sums of the last step", "column_sums += tl.sum", "column_sums = tl.sum", BACKWARD),
    grad("sums unreduced", "reduce_parts(part_sums, sums, 1.0, seed, mask)", "", SPLIT),
    both("one read: scales exchanged", "reduce_parts(dh_parts, dh, h_scale)",
         "reduce_parts(dh_parts, dh, up_scale)", ONE_READ),
    both("one read: dB by the other scale", "reduce_parts(grad_parts, grad, up_scale)",
         "reduce_parts(grad_parts, grad, h_scale)", ONE_READ),
    both("one read: never wide", "dtype=torch.float32 if wide else dy.dtype) sums",
         "dtype=dy.dtype)\n    sums", MIXED),
    both("one read: parts of the first block", "place = grad + (block * n + cols)",
         "place = grad + cols", MANY_TILES),
    both("one read: sums of the first block", "tl.store(sums + block * n + cols",
         "tl.store(sums + cols", MANY_TILES),
    both("one read: down not advanced", "down_tile += COLS * tl.cast(down_col, tl.int64)", "",
         MANY_TILES),
    mask("row origin ignored", "block_row += tl.load(seed + 2) // 16", ""),
    mask("column origin ignored", "block_col += tl.load(seed + 3) // 16", ""),
    mask("shift ignored", "row = (tl.load(seed + 2) % 16).to(tl.int32)", "row = 0"),
    mask("words exchanged", "words = tl.permute(words, (0, 1, 3, 2))", ""),
    mask("halves exchanged", "tl.join(words & BITS, (words >> 16) & BITS)",
         "tl.join((words >> 16) & BITS, words & BITS)"),
    mask("threshold itself dropped", "keep = bits.to(tl.int32) >= threshold",
         "keep = bits.to(tl.int32) > threshold"),
    mask("offset of 32 bits", "((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)",
         "(offset & 0).to(tl.uint32)"),
    mask("row group of 32 columns", "(block_col * 4).to(tl.uint32)",
         "(block_col * 2).to(tl.uint32)"),
    ranks("the first ranks again", "ranks += program % blocks * RANK", "ranks += 0"),
    ranks("more ranks than there are", "mask = mask & (ranks < r)[None, :]",
          "mask = mask & (ranks < r + 1)[None, :]"),
    flow("dh only for dx", "need_dh = need_x or need_a", "need_dh = need_x", SUBSETS),
    flow("undropped x in dA", "weight_grad(dh, x, seed, threshold",
         "weight_grad(dh, x, None, threshold"),
    flow("no mask in dx", "None, seed, threshold, up_scale) if need_a",
         "None, None, threshold, up_scale)\n    if need_a"),
    flow("wide of B for A", "up_scale, wide_a, False)", "up_scale, wide_b, False)", MIXED),
    flow("h as if contiguous", "h, seed = h.contiguous(), None", "h, seed = h, None",
         "test_triton.py::test_h_of_any_layout"),
    configs("a last part lost", "return span, max(cdiv(length, span), 1)",
            "return span, max(length // span, 1)"),
    # edges, windows, rounding and far apart memory: one of each kind in every kernel
    down("a 16-bit accumulator", "total = tl.dot(left, right, total, input_precision=PRECISION)",
         "total = tl.dot(left, right, total, input_precision=PRECISION)"
         ".to(left.dtype).to(tl.float32)", ONCE),
    down("parts of 16 bits", "x.new_empty(splits, m, r, dtype=torch.float32)",
         "x.new_empty(splits, m, r)", ONCE),
    down("rounded before it is scaled", "(total * scale).to(h.dtype.element_ty)",
         "(total.to(h.dtype.element_ty).to(tl.float32) * scale).to(h.dtype.element_ty)", ONCE),
    down("parts one on another", "h + tl.program_id(1).to(tl.int64) * h_part",
         "h + tl.program_id(1).to(tl.int64) * 0", ONCE),
    down("a column too many", "inside = dropout.within(cols, k, MASK)",
         "inside = dropout.within(cols, k + 1, MASK)", TILES),
    down("no program for shifted rows", "cdiv(m + shift, config.rows)", "cdiv(m, config.rows)",
         WINDOWS),
    down("no part for shifted columns", "config.split(k + shift,", "config.split(k,", WINDOWS),
    down("one launch for every window", "for mask in dropout.masks_of(seed):",
         "for mask in dropout.masks_of(seed)[:1]:", WINDOWS),
    down("steps of 32 bits", "x_tile += DEPTH * tl.cast(x_col, tl.int64)",
         "x_tile += DEPTH * x_col", FAR),
    down("launched for nothing", "if h.numel() > 0:", "if True:", f"{EDGES} -k nothing"),
    gemm("a 16-bit accumulator", "there[None, :], other=0.0) total = tl.dot(left, right, total, "
         "input_precision=PRECISION) x_tile +=", "there[None, :], other=0.0)\n"
         "        total = tl.dot(left, right, total, input_precision=PRECISION)"
         ".to(left.dtype).to(tl.float32)\n        x_tile +=", ONCE),
    gemm("a term of 16 bits", "term *= scale",
         "term = (term * scale).to(h.dtype.element_ty).to(tl.float32)", ONCE),
    grad("sums in 16 bits", "column_sums += tl.sum(left.to(tl.float32), 1)",
         "column_sums += tl.sum(left, 1).to(left.dtype).to(tl.float32)", ONCE),
    grad("columns of 32 bits", "cols.to(tl.int64)[:, None] * x_col", "cols[:, None] * x_col", FAR),
    mask("columns alone are off the blocks",
         "(tl.load(seed + 2) % 16 != 0) | (tl.load(seed + 3) % 16 != 0)",
         "tl.load(seed + 3) % 16 != 0", WINDOWS),
    mask("rows and columns are off the blocks",
         "(tl.load(seed + 2) % 16 != 0) | (tl.load(seed + 3) % 16 != 0)",
         "(tl.load(seed + 2) % 16 != 0) & (tl.load(seed + 3) % 16 != 0)", WINDOWS),
    mask("origins below 8", "(tl.load(seed + 3) % 16).to(tl.int32)",
         "(tl.load(seed + 3) % 8).to(tl.int32)", WINDOWS),
    mask("shifts below 15", "return 15 if mask", "return 14 if mask", WINDOWS),
    reduce("a part lost", "for _ in range(count):", "for _ in range(count - 1):", ONCE),
    reduce("unscaled", "(total * scale).to(out.dtype.element_ty)",
           "total.to(out.dtype.element_ty)", ONCE),
    flow("wide of A for B", "up_scale, wide_b, need_b, need_bias",
         "up_scale, wide_a, need_b, need_bias", WIDTHS),
    flow("wide of A for B in two reads", "0, up_scale, wide_b, True, need_bias",
         "0, up_scale, wide_a, True, need_bias", WIDTHS),
]  # fmt: skip

"""Planted bugs in the C++ kernels for CPUs and their operators, and the tests that must notice."""

from __future__ import annotations

from mutants_python import MIXED, VANISHES, PackageMutant


def of(file: str, tests: str):
    """Makes mutants of one file, of whom `tests` expect the same unless they say otherwise."""

    def mutant(name: str, text: str, replacement: str, own: str = "") -> PackageMutant:
        return PackageMutant(f"cpu {name}", f"csrc/{file}", text, replacement, own or tests)

    return mutant


EVERY_SHAPE = "test_lora_linear.py::test_c1_every_shape -k cpu"
LARGE = "test_lora_linear.py::test_c1_c2_large -k cpu"
STRIDES = "test_lora_linear.py::test_fault_17_any_strides -k cpu"
SAME_BITS = "test_dropout.py -k specification_element"
CONVERSIONS = "test_kernels.py -k conversions"
THREADS = "test_dropout.py -k threads_do_not"
SUBSETS = "test_faults_shapes.py::test_fault_19_requires_grad_subsets -k cpu"
MANY_RANKS = "test_kernels.py::test_fused_gemm -k cpp"
DEEP = "test_kernels.py::test_panels_of_a_16bit_operand"
PANELS = "test_group.py::test_panels_of_a_16bit_dx"
GROUP = "test_group.py::test_every_shape -k cpu"
DIRECT = "test_direct_calls.py"

down = of("cpu/down_proj.inl", EVERY_SHAPE)
gemm = of("cpu/fused_gemm.inl", EVERY_SHAPE)
grad = of("cpu/weight_grad.inl", EVERY_SHAPE)
mask = of("cpu/mask.inl", SAME_BITS)
micro = of("cpu/microkernel.inl", EVERY_SHAPE)
simd = of("cpu/simd.inl", CONVERSIONS)
tile = of("cpu/tile.inl", STRIDES)
parallel = of("torch/cpu_call.h", LARGE)
call = of("torch/cpu_call.cpp", LARGE)
ops = of("torch/cpu.cpp", LARGE)
group = of("torch/cpu_group.cpp", GROUP)
convert = of("torch/convert.h", STRIDES)

KILLED = [
    # down_proj
    down("down_proj: depth tail dropped", "k < a.K; k += kDepth", "k + kDepth <= a.K; k += kDepth"),
    down("down_proj: mask of the first columns", "a.dropout, row, k, rows",
         "a.dropout, row, 0, rows"),
    down("down_proj: mask of the first rows", "open_tile(a.x, a.dropout, row, k,",
         "open_tile(a.x, a.dropout, row - row_begin, k,"),
    down("down_proj: unscaled", "from_float(a.scale * acc", "from_float(acc"),
    down("down_proj: sums of the block before", "fill_zero(acc, rows * ld);",
         "if (row == row_begin) fill_zero(acc, rows * ld);"),
    down("down_proj: first ranks again", "(rank_begin + j) * a.h.col_stride", "j * a.h.col_stride"),
    down("down_proj: down of the first ranks", "rank_begin + j, count, k", "j, count, k"),
    down("down_proj: a last rank lost", "min(width, rank - j)",
         "min(width, max(rank - j - (rank > 16), 1))"),
    # the epilogue
    gemm("epilogue: bias of the first columns", "read_tile(a.bias, 0, col, 1,",
         "read_tile(a.bias, 0, 0, 1,"),
    gemm("epilogue: bias lost", "lora[i * ld + j] + bias[j]), y", "lora[i * ld + j]), y"),
    gemm("epilogue: unscaled", "(a.scale * lora[i * ld + j]", "(lora[i * ld + j]"),
    gemm("epilogue: h of the first ranks", "col == left) read_tile(a.h, row, k,",
         "col == left) read_tile(a.h, row, 0,"),
    gemm("epilogue: stale h of many ranks", "if (!once || col == left) read_tile",
         "if (col == left) read_tile", MANY_RANKS),
    gemm("epilogue: stale panels of many ranks", "if (!once || row == row_begin)",
         "if (row == row_begin)", MANY_RANKS),
    gemm("epilogue: mask counted from the part", "drop(a.dropout, row, col, rows",
         "drop(a.dropout, row - a.first_row, col - a.first_col, rows", PANELS),
    gemm("epilogue: one block of rows", "row < row_end; row += kRowBlock) { const int64_t rows",
         "row < row_end; row += row_end) {\n      const int64_t rows"),
    gemm("epilogue: terms of the strip before", "fill_zero(lora, rows * ld);",
         "if (col == left) fill_zero(lora, rows * ld);"),
    # weight_grad
    grad("weight_grad: row tail dropped", "row < a.M; row += kChunk",
         "row + (a.M > kChunk ? kChunk : 1) <= a.M; row += kChunk", LARGE),
    grad("weight_grad: no mask on ragged columns",
         "if (a.dropout.seed != nullptr) drop(a.dropout, row, col, rows, cols, tile, ld);", ""),
    grad("weight_grad: h of the first ranks", "read_tile(a.h, row, rank_begin,",
         "read_tile(a.h, row, 0,"),
    grad("weight_grad: h of the first rows", "read_tile(a.h, row, rank_begin,",
         "read_tile(a.h, 0, rank_begin,", LARGE),
    grad("weight_grad: rounded each chunk", "multiply_panel<2>(h, 1, rank, x.data + j",
         "multiply_panel<1>(h, 1, rank, x.data + j"),
    grad("weight_grad: ranks past 128 lost", "rank < a.r; rank += 128",
         "rank < min(a.r, 128); rank += 128"),
    # the mask
    mask("mask: threshold itself dropped", "(w.v[v] & kMaskBits) >= threshold",
         "(w.v[v] & kMaskBits) > threshold", "test_dropout.py -k every_implementation"),
    mask("mask: odd columns as even ones", "(w.v[v] >> 16 & kMaskBits) >= threshold",
         "(w.v[v] & kMaskBits) >= threshold"),
    mask("mask: registers exchanged", "g + v % 2 * 8][fragment * 16 + v / 2 * 8]",
         "g + v / 2 * 8][fragment * 16 + v % 2 * 8]"),
    mask("mask: row origin ignored", "row_begin = row0(dropout) + row,", "row_begin = row,"),
    mask("mask: column origin ignored", "col_begin = col0(dropout) + col,", "col_begin = col,"),
    mask("mask: offset of 32 bits", "static_cast<uint64_t>(dropout.seed[1])",
         "static_cast<uint32_t>(dropout.seed[1])"),
    mask("mask: a block of rows lost", "min(block_row + 16, row_end)",
         "min(block_row + 15, row_end)"),
    mask("mask: columns of the block's first", "block[r - block_row][first_col - block_col]",
         "block[r - block_row][0]"),
    # the microkernel
    micro("microkernel: two of three rows", "case 3: return multiply_block<3",
          "case 3: return multiply_block<2"),
    micro("microkernel: a last row lost", "case 1: return", "case 7: return"),
    micro("microkernel: sums replaced", "store(out, load(out) + sum[i][v]);",
          "store(out, sum[i][v]);"),
    micro("microkernel: packed rows of stride 1", "if (row_stride == 1) {",
          "if (row_stride >= 1) {"),
    micro("microkernel: last depth lost", "for (int64_t k = 0; k < depth; ++k) { Vec bv",
          "for (int64_t k = 0; k < depth - (depth > 8); ++k) {\n    Vec bv"),
    # conversions
    simd("bf16 cut", "bits + 0x7fff + (bits >> 16 & 1)", "bits"),
    simd("bf16 ties up", "bits + 0x7fff + (bits >> 16 & 1)", "bits + 0x8000"),
    simd("fp16 ties up", "0xfff + (magnitude >> 13 & 1)", "0x1000"),
    simd("fp16 subnormals flushed", "uint32_t{127 - 14} << 23, subnormal, normal)",
         "uint32_t{127 - 14} << 23, 0, normal)"),
    simd("fp16 overflow wraps", "select(magnitude >= uint32_t{127 + 16} << 23, special,",
         "select(magnitude >= uint32_t{127 + 17} << 23, special,"),
    simd("fp16 subnormals read as zero", "select(exponent == 0, subnormal, normal)",
         "select(exponent == 0, 0, normal)"),
    simd("fp16 sign lost", "static_cast<uint16_t>(half | sign)", "static_cast<uint16_t>(half)"),
    # tiles
    tile("tile: column stride ignored", "if (col_stride == 1) {", "if (col_stride >= 1) {"),
    tile("tile: read in place transposed", "x.dtype == Dtype::f32 && x.col_stride == 1 &&",
         "x.dtype == Dtype::f32 &&"),
    tile("tile: read in place undropped", "x.col_stride == 1 && dropout.seed == nullptr",
         "x.col_stride == 1", EVERY_SHAPE),
    tile("tile: dropped by multiplying", "keep[r * kStrip + c] ? out[c] : 0.0f",
         "keep[r * kStrip + c] * out[c]", VANISHES),
    # the operators
    parallel("threads: a row lost between two", "f(begin * unit, std::min(end * unit, extent));",
             "f(begin * unit + (begin > 0), std::min(end * unit, extent));", THREADS),
    call("down_proj: vendor's, undropped",
         "x.matrix.dtype == Dtype::f32 && dropout.seed == nullptr &&",
         "x.matrix.dtype == Dtype::f32 &&", EVERY_SHAPE),
    call("down_proj: vendor's, unscaled", "as_tensor(transposed(down)), 0.0, scale)",
         "as_tensor(transposed(down)), 0.0, 1.0)", EVERY_SHAPE),
    call("down_proj: no 1/q",
         "x.cols, down.rows, static_cast<float>(scale * inverse_keep(dropout))",
         "x.cols, down.rows,\n                   static_cast<float>(scale)"),
    call("fused_gemm: no 1/q", "r, static_cast<float>(scale * inverse_keep(dropout)), dropout};",
         "r, static_cast<float>(scale), dropout};"),
    call("weight_grad: no 1/q",
         "K, r, static_cast<float>(scale * inverse_keep(dropout)), dropout}); return grad.tensor;",
         "K, r, static_cast<float>(scale), dropout});\n  return grad.tensor;"),
    call("fused_gemm: fp32 term unscaled", "as_tensor(transposed(up)), 1.0, args.scale);",
         "as_tensor(transposed(up)), 1.0, 1.0);", MANY_RANKS),
    call("fused_gemm: fp32 bias lost", "addmm_out(y, *bias, x_t, weight_t, 1.0, 1.0);",
         "addmm_out(y, *bias, x_t, weight_t, 0.0, 1.0);"),
    call("fused_gemm: masked in the vendor's way", "if (args.dropout.seed != nullptr) { mm_out",
         "if (false) {\n    mm_out"),
    call("fused_gemm: 16-bit weight of the first panel", "fp32_rows(weight, col, cols)",
         "fp32_rows(weight, 0, cols)", DEEP),
    call("fused_gemm: a last row panel lost", "row < args.M; row += row_panel",
         "row + (row > 0) * row_panel <= args.M; row += row_panel", DEEP),
    call("weight_grad: transposed or not", "transpose ? transposed(grad).matrix : grad.matrix",
         "grad.matrix"),
    call("weight_grad: never wide", "wide ? ScalarType::Float : x.tensor.scalar_type()",
         "x.tensor.scalar_type()"),
    ops("forward: scales exchanged", "dropout_of(seed, threshold, op), h_scale); Tensor y",
        "dropout_of(seed, threshold, op), up_scale);\n  Tensor y"),
    ops("backward: dh by the other scale", "dh = down_proj(dy_rows, transposed(b), {}, h_scale);",
        "dh = down_proj(dy_rows, transposed(b), {}, up_scale);"),
    ops("backward: dh only for dx", "if (need_x || need_a) dh", "if (need_x) dh", SUBSETS),
    ops("backward: no mask in dA", 'weight_grad(dh, flatten_rows(x, op, "x"), dropout, up_scale',
        'weight_grad(dh, flatten_rows(x, op, "x"), {}, up_scale'),
    ops("backward: mask in dB", 'weight_grad(operand(h, op, "h"), dy_rows, {}, up_scale',
        'weight_grad(operand(h, op, "h"), dy_rows, dropout, up_scale'),
    ops("backward: wide of A for B", "dy_rows, {}, up_scale, wide_b, true)",
        "dy_rows, {}, up_scale, wide_a, true)", MIXED),
    ops("backward: dB by the other scale", "dy_rows, {}, up_scale, wide_b, true)",
        "dy_rows, {}, h_scale, wide_b, true)"),
    group("group: dx of the last in fp32", "beta = 1.0;", "", GROUP),
    group("group: rounded at each term", "if (&s == &shares.back()) args.y = part", "args.y = part",
          GROUP),
    call("16 bits: never the vendor's", "dtype == Dtype::f32 || (dtype == Dtype::bf16",
         "dtype == Dtype::f32 || false && (dtype == Dtype::bf16",
         "test_native_gemm.py -k the_vendor_multiplies"),
    call("16 bits: flags exchanged", "vendor_has_bf16 = bf16; vendor_has_fp16 = fp16;",
         "vendor_has_bf16 = fp16; vendor_has_fp16 = bf16;",
         "test_native_gemm.py -k one_dtype_alone"),
    group("16 bits, group: sum of products replaced", "operand(add(sum.tensor, product)",
          "operand(add(product, product)", "test_native_gemm.py -k groups"),
    group("16 bits, group: terms of the last alone", "if (first) args.product",
          "args.product", "test_native_gemm.py -k groups"),
    group("group: small products not added", "sums[i] += product[i];", "sums[i] = product[i];",
          GROUP),
    group("group: 16-bit products replaced", "i == 0 ? 0.0 : 1.0, 1.0);", "0.0, 1.0);", GROUP),
    group("group: wide of A for B", "dy, {}, up_scales[i], wide_b[i], true)",
          "dy, {}, up_scales[i], wide_a[i], true)", MIXED),
    group("group: masks of the first",
          "const Dropout dropout = dropout_of(seeds[i], threshold, op);",
          "const Dropout dropout = dropout_of(seeds[0], threshold, op);", GROUP),
    group("group: terms of the first scale", "dropout, up_scales[i]});", "dropout, up_scales[0]});",
          GROUP),
    call("group: a column block lost", "std::min(col + kColBlock, end));",
         "std::min(col + kColBlock, end - (end > 512)));", GROUP),
    # what direct calls alone ask for
    group("group: fp32 term unscaled", "as_tensor(transposed(s.up)), 1.0, s.scale);",
          "as_tensor(transposed(s.up)), 1.0, 1.0);", DIRECT),
    convert("1/q divided by zero", "d.seed == nullptr || d.threshold == kMaskRange",
            "d.seed == nullptr", DIRECT),
    convert("storage: offset forgotten", "end = t.storage_offset() + 1;", "end = 1;", DIRECT),
    convert("up rows unchecked", 'check_size(up.rows, weight.rows, op, "up.size(0)");', "", DIRECT),
    # tensors as matrices
    convert("rows taken as evenly apart", "in_place && t.stride(i) == rows * row_stride",
            "in_place", "test_faults_shapes.py::test_fault_15_expanded_x_and_dy -k cpu"),
    convert("bias taken as contiguous", "\"bias\"), 0, bias->stride(0), dtype}",
            "\"bias\"), 0, 1, dtype}", "test_lora_linear.py::test_a_strided_bias -k cpu"),
    convert("1/q off by one", "double(kMaskRange - d.threshold)",
            "double(kMaskRange - d.threshold - 1)", LARGE),
    convert("transposed keeps its sizes", "m.dtype}, a.cols, a.rows};",
            "m.dtype}, a.rows, a.cols};", LARGE),
]  # fmt: skip

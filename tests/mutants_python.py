"""Planted bugs in the Python of the package, and the tests that must notice each.

The text must occur in the file exactly once; any white space in it stands for any other. `tests`
are arguments of pytest.
"""

from __future__ import annotations

from typing import NamedTuple


class PackageMutant(NamedTuple):
    name: str
    file: str
    text: str
    replacement: str
    tests: str


def of(file: str, tests: str = ""):
    """Makes mutants of one file, of whom `tests` expect the same unless they say otherwise."""

    def mutant(name: str, text: str, replacement: str, own: str = "") -> PackageMutant:
        return PackageMutant(name, f"lora_kernels/{file}", text, replacement, own or tests)

    return mutant


LARGE = "test_lora_linear.py::test_c1_c2_large"
reference = of("reference.py", f"{LARGE} -k reference")
explained = of("explanation.py", "test_dispatch_calls.py -k explain")
backend = of("backend.py", "test_native_gemm.py -k one_dtype_alone")
composed = of("composed.py", f"{LARGE} -k composed")
dropout = of("dropout.py", "test_dropout.py -k every_implementation")
ops = of("ops.py", "test_ops.py")
call = of("functional.py", "test_ops.py")
group = of("group.py", "test_group.py test_group_arguments.py")
layer = of("linear.py", "test_linear.py")
peft = of("peft_linear.py", "test_peft.py")
OFF = "test_faults_arguments.py -k exactly_the_base"
SHARDS = "test_lora_linear.py::test_shards_draw_the_mask_of_the_whole -k cpu"
FRAGMENTS = "test_dropout.py -k fragments_of_mma"
VANISHES = "test_faults_values.py -k vanishes"
DEFINITION = "test_ops.py -k the_definition"
AUTOCAST = "test_ops.py test_faults_autograd.py -k autocast"

OVERFLOW = "test_faults_values.py -k does_not_overflow_where"
MIXED = "test_lora_linear.py::test_adapters_of_two_dtypes"
OFF_BIAS = "test_faults_arguments.py -k exactly_the_base"
SAVED = "test_ops.py::test_what_is_saved_for_backward"
UNDEFINED = "test_ops.py -k no_gradient_arrives"
SUBSETS = "test_faults_shapes.py::test_fault_19_requires_grad_subsets -k composed"
OPCHECK = "test_ops.py::test_fault_32_opcheck"
CALLS = "test_dispatch_calls.py"
ROUNDED = "test_rounding.py -k reference"
FAKES = "test_fakes.py"
DRAWN = "test_dropout.py -k uses_every_bit"
SLICED = "test_group.py::test_more_projections_than_one_call_takes"

KILLED = [
    # the definition
    reference("reference: 1/(1-p) for the exact one", "seed, dropout_p) / keep",
              "seed, dropout_p) / (1 - dropout_p)"),
    reference("reference: no 1/q", "seed, dropout_p) / keep", "seed, dropout_p)"),
    reference("reference: bias forgotten", "wide_w, None if bias is None else bias.to(wide))",
              "wide_w)"),
    reference("reference: scaling forgotten", "h = (scaling * torch", "h = (1.0 * torch"),
    reference("reference: a gradient for the weight", "weight.detach().to(x.dtype)",
              "weight.to(x.dtype)", DEFINITION),
    reference("reference: no gradients when off",
              "elif lora_a.requires_grad or lora_b.requires_grad:", "elif False:", OFF),
    reference("reference: what is off leaks", "parameter, 0", "parameter, parameter", OFF),
    reference("reference: wide gradient rounded twice", "return grad, None",
              "return grad.bfloat16().to(grad.dtype), None"),
    reference("reference: adapters not cast", "return t if t.dtype == dtype else _Rounded",
              "return t if True else _Rounded"),
    reference("reference: autocast left on", "with autocast.off(x.device.type):",
              'with autocast.off("meta"):', AUTOCAST),
    reference("reference: x not cast by autocast", "x, bias = autocast.cast(x), None",
              "x, bias = x, None", DEFINITION),
    reference("reference: draws what drops nothing", "dropout.drops(dropout_p):", "dropout_p > 0:",
              "test_dropout.py -k draws_nothing"),
    reference("reference: dropped by multiplying", "torch.where(mask.view(x.shape), x, 0.0)",
              "x * mask.view(x.shape)", VANISHES),
    # the vendor's GEMMs
    composed("composed: no 1/q in h", "scale *= dropout.inverse_keep(threshold) h = x.new_empty",
             "pass\n    h = x.new_empty"),
    composed("composed: no 1/q in dA", "scale *= dropout.inverse_keep(threshold) left, right =",
             "pass\n    left, right ="),
    composed("composed: no 1/q in dx", "alpha=scale * dropout.inverse_keep(threshold)",
             "alpha=scale"),
    composed("composed: 1-p for q in dx", "alpha=scale * dropout.inverse_keep(threshold)",
             "alpha=scale / round(1 - threshold / 16384, 2)"),
    composed("composed: h dropped by multiplying",
             "x = torch.where(mask, x, 0) scale *= dropout.inverse_keep(threshold) h =",
             "x = x * mask; scale *= dropout.inverse_keep(threshold)\n    h =", VANISHES),
    composed("composed: dA dropped by multiplying",
             "x = torch.where(mask, x, 0) scale *= dropout.inverse_keep(threshold) left",
             "x = x * mask; scale *= dropout.inverse_keep(threshold)\n    left", VANISHES),
    composed("composed: dx dropped by multiplying", "rows.add_(torch.where(mask, term, 0))",
             "rows.add_(term * mask)", VANISHES),
    composed("composed: bias forgotten", "if bias is None: torch.mm", "if True:\n        torch.mm"),
    composed("composed: up projection unscaled", "rows.addmm_(h, up.t(), alpha=scale)",
             "rows.addmm_(h, up.t())", OVERFLOW),
    composed("composed: h unscaled", "beta=0, alpha=scale) def fused_gemm",
             "beta=0)\n\n\ndef fused_gemm"),
    composed("composed: y is a view", "threshold, scale) return y",
             "threshold, scale)\n    return rows.view(y.shape)", "test_ops.py -k in_place"),
    composed("composed: a wide gradient of 16 bits", "if wide: # only", "if False:  # only"),
    composed("composed: wide gradient rounded twice",
             "return grad.addmm_(left.t(), right, beta=0, alpha=scale)",
             "return grad.addmm_(left.t(), right, beta=0, alpha=scale).to(x.dtype).to(grad.dtype)"),
    composed("composed: wrong scale of dh", "lora_b.t(), None, 0, h_scale)",
             "lora_b.t(), None, 0, up_scale)"),
    composed("composed: wide of A for B", "up_scale, wide_b, True)", "up_scale, wide_a, True)",
             MIXED),
    composed("composed: wide of B for A", "up_scale, wide_a, False)", "up_scale, wide_b, False)",
             MIXED),
    composed("composed: undropped x in dA", "weight_grad(dh, x, seed, threshold",
             "weight_grad(dh, x, None, threshold"),
    composed("composed: dropout in dB", "weight_grad(h, dy, None, 0,",
             "weight_grad(h, dy, seed, threshold,"),
    composed("composed: no mask in dx", "lora_a.t(), None, seed, threshold",
             "lora_a.t(), None, None, threshold"),
    composed("composed: dh only for dx", "if need_x or need_a:", "if need_x:", SUBSETS),
    composed("composed: dbias without the last row", "rows_of(dy).sum(0)",
             "rows_of(dy)[:-1].sum(0)"),
    composed("composed: group dx misses a product",
             "dx.view(dh.shape[0], weight.shape[0]).addmm_(rows_of(dy), weight.t())",
             "dx.view(dh.shape[0], weight.shape[0])",
             "test_group.py::test_every_shape -k grouped_queries-bf16"),
    composed("composed: group dx misses a term",
             "_add_up_projection(rows, dh, up, seed, threshold, scale) return dx", "return dx",
             "test_group.py::test_every_shape -k grouped_queries-bf16"),
    composed("group flow: the last dx alone", "return more if dx is None else dx.add_(more), *rest",
             "return more, *rest", "test_group.py::test_a_backend_without_group_functions"),
    composed("sliced flow: the last projection lost", "range(0, count, step)",
             "range(0, count - 1, step)", "test_group.py"),
    composed("sliced flow: one dx of several", "dx.add_(other)", "dx = other + 0 * dx", SLICED),
    composed("composed: dB unscaled", "weight_grad(h, dy, None, 0, up_scale",
             "weight_grad(h, dy, None, 0, 1.0"),
    # the mask
    dropout("mask: threshold cut", "return round(p * RANGE)", "return int(p * RANGE)",
            "test_dropout.py -k keep_probability"),
    dropout("mask: q is 1-p", "return 1 - drop_threshold(p) / RANGE", "return 1 - p",
            "test_dropout.py -k keep_probability"),
    dropout("mask: draws what drops nothing", "return p > 0.5 / RANGE", "return p > 0",
            "test_dropout.py -k draws_nothing"),
    dropout("mask: 1/q is not exact", "return RANGE / max(", "return (RANGE - 1) / max(",
            f"{LARGE} -k composed"),
    dropout("mask: origins exchanged", "(seed[2], seed[3]) if", "(seed[3], seed[2]) if", SHARDS),
    dropout("mask: origin ignored", "if seed.shape[0] == 4 else (0, 0)", "if False else (0, 0)",
            SHARDS),
    dropout("mask: threshold itself dropped", "return bits >= threshold", "return bits > threshold",
            FRAGMENTS),
    dropout("mask: six rounds", "for _ in range(7)", "for _ in range(6)", f"{LARGE} -k cpu"),
    dropout("mask: halves of a block exchanged", "row // 8 % 2 == 0, col", "row // 8 % 2 == 1, col",
            FRAGMENTS),
    dropout("mask: offset of 32 bits", "offset & _WORD, (offset >> 32) & _WORD",
            "offset & _WORD, (offset >> 32) & 0"),
    dropout("mask: seed of 32 bits", "seed & _WORD, (seed >> 32) & _WORD",
            "seed & _WORD, (seed >> 32) & 0"),
    dropout("mask: columns in pairs of groups", "col // 16 * 4 + col % 8 // 2",
            "col // 16 * 4 + col % 4 // 2", FRAGMENTS),
    dropout("seed does not advance", "torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, ",
            "torch.zeros(2, dtype=torch.int64, ", "test_dropout.py -k drawn_seed"),
    # the run of a call
    ops("h_scale and up_scale exchanged in split", "return mantissa, math.ldexp(1.0, exponent)",
        "return math.ldexp(1.0, exponent), mantissa", OVERFLOW),
    ops("fp16 not split", "if dtype != torch.float16 or scaling == 0:", "if True:", OVERFLOW),
    ops("forward: scales exchanged", "plan.threshold, plan.h_scale, plan.up_scale )",
        "plan.threshold, plan.up_scale, plan.h_scale\n    )", OVERFLOW),
    ops("backward: scales exchanged",
        "lora_b, h, seed, plan.threshold, plan.h_scale, plan.up_scale, wide_a",
        "lora_b, h * (plan.up_scale / plan.h_scale), seed, plan.threshold, plan.up_scale, "
        "plan.h_scale, wide_a", OVERFLOW),
    ops("p = 1 is on", "scaling == 0 or threshold == dropout.RANGE", "scaling == 0", OFF),
    ops("wide of A for B in a call", "wide_a, wide_b = lora_a.dtype is not x.dtype, lora_b.dtype",
        "wide_a, wide_b = lora_a.dtype is not x.dtype, lora_a.dtype", MIXED),
    ops("off: bias gets no gradient", "on, need_x, False, False, need_bias )",
        "on, need_x, False, False, False\n    )", OFF_BIAS),
    ops("off: gradient of A absent", "lora_a.new_zeros(lora_a.shape) if need_a else da", "da", OFF),
    ops("a copy of x is saved", "ctx.save_for_backward(kept, weight, lora_a, lora_b, h, seed)",
        "ctx.save_for_backward(kept.clone(), weight, lora_a, lora_b, h, seed)", SAVED),
    ops("a cast of the weight is saved",
        "ctx.save_for_backward(kept, weight, lora_a, lora_b, h, seed)",
        "ctx.save_for_backward(kept, weight.to(x.dtype), lora_a, lora_b, h, seed)",
        "test_ops.py::test_fp32_weight_is_saved_uncast_under_autocast"),
    ops("double backward in silence",
        "return (None,) * 7 if torch.is_grad_enabled(): _no_double_backward()",
        "return (None,) * 7", "test_faults_autograd.py -k fault_28"),
    ops("no gradient is an error", "if dy is None: return (None,) * 7", "", UNDEFINED),
    ops("op: no gradient is an error", "if dy is None: return (None,) * 9", "", UNDEFINED),
    ops("op: h is differentiable", "ctx.mark_non_differentiable(output[1])", "", UNDEFINED),
    ops("op: bias not cast by autocast", "None if bias is None else autocast.cast(bias) # An fp32",
        "bias\n    # An fp32", "test_ops.py::test_autocast_of_the_operator"),
    ops("op: h of an adapter that is off", "x.new_zeros(h.shape[0], lora_a.shape[0]) if plan.off",
        "h if plan.off", "test_ops.py::test_fault_32_opcheck -k off"),
    ops("fake: weight_grad not transposed", "(k, r) if transpose else (r, k)", "(r, k)", OPCHECK),
    ops("fake: weight_grad never wide", "dtype = torch.float32 if wide else x.dtype",
        "dtype = x.dtype", OPCHECK),
    ops("fake: backward never wide", "a = lora_a.float() if wide_a else lora_a b = lora_b.float() "
        "if wide_b else lora_b return _fake_grads(x, a, b, *needs)",
        "return _fake_grads(x, lora_a, lora_b, *needs)", OPCHECK),
    ops("fake: gradients in x's dtype", "lora_a.new_empty(lora_a.shape) if need_a",
        "x.new_empty(lora_a.shape) if need_a", OPCHECK),
    ops("fake: gradient of the bias of rank r", "lora_b.shape[0] if need_bias",
        "lora_b.shape[1] if need_bias", OPCHECK),
    # the call
    call("autocast: bias not cast", "x.to(dtype), None if bias is None else bias.to(dtype)",
         "x.to(dtype), bias", AUTOCAST),
    call("a seed although p is 0", "if not dropout.drops(dropout_p): seed = None elif seed",
         "if seed", "test_dropout.py -k draws_nothing"),
    call("a seed that is not contiguous", "None if seed is None else seed.contiguous()", "seed",
         "test_dropout.py -k strided_seed"),
    call("one seed for all calls", "seed = dropout.draw_seed(x.device)",
         "seed = torch.tensor([1, 2])", "test_dropout.py -k drawn_seed"),
    call("compiled: scaling of the first call", "else (lora_b * scaling, 1.0)",
         "else (lora_b, 1.0)", "test_compile.py -k scaling"),
    call("float64 to any backend", 'or (name == "" and x.dtype == torch.float64)', "",
         "test_ops.py::test_fault_06_float64_takes_the_reference"),
    # groups
    group("group: one seed for all", "[_seed(seed, x) if dropped else None for seed in seeds]",
          "[_seed(seeds[0], x) if dropped else None for seed in seeds]",
          "test_group.py -k own_mask"),
    group("group: seeds drawn backwards", "[_seed(seed, x) if dropped else None for seed in seeds]",
          "[_seed(seed, x) if dropped else None for seed in seeds[::-1]][::-1]",
          "test_group.py -k drawn_seeds"),
    group("group: scales of the first projections", "tuple(part[i] for i in used)",
          "part[: len(used)]", "test_group.py -k unused_outputs"),
    group("group: gradient of A absent when off", "if off and need_a[i]:", "if False:",
          "test_group.py -k is_off"),
    group("group: gradient of B absent when off", "if off and need_b[i]:", "if False:",
          "test_group.py -k is_off"),
    group("group: every output used", "if dy is not None]", "]", "test_group.py -k unused_outputs"),
    group("group: wide of A for B", "for ts in (lora_as, lora_bs))",
          "for ts in (lora_as, lora_as))", MIXED),
    group("group: bias not cast", "None if b is None else autocast.cast(b) for b", "b for b",
          "test_group_autograd.py -k autocast_equals"),
    group("group op: scalings of the first", "[scalings[i] for i in used], dropout_p",
          "scalings[: len(used)], dropout_p", "test_group_autograd.py -k compiled_equals"),
    group("group op: empty bias added", "b if b.numel() else None for b", "b for b",
          "test_group_autograd.py -k compiled_equals"),
    group("group: x is saved for each",
          "ctx.save_for_backward(kept, *weights, *lora_as, *lora_bs, *hs, *seeds) ctx.plan",
          "ctx.save_for_backward(kept, *weights, *lora_as, *lora_bs, *hs, *seeds, x)\n"
          "        ctx.plan", "test_group.py -k saved_for"),
    # the layer
    layer("dropout in eval", "self.lora_dropout if self.training else 0.0", "self.lora_dropout"),
    layer("rslora ignored", "(math.sqrt(r) if use_rslora else r)", "r"),
    layer("merge without scaling", "delta, alpha=self.scaling)", "delta)"),
    layer("merged in 16 bits", "wide = torch.promote_types(self.weight.dtype, torch.float32)",
          "wide = self.weight.dtype"),
    layer("unmerge leaves the sum", "self.weight = self._frozen.pop()", "self._frozen.pop()"),
    layer("state dict of the merged weight", "for frozen in self._frozen: destination",
          "for frozen in ():\n            destination"),
    layer("loaded while merged", "self.unmerge() super()._load", "super()._load"),
    layer("the kept weight is not moved", "for frozen in self._frozen: frozen.data",
          "for frozen in ():\n            frozen.data"),
    layer("bias trains", "nn.Parameter(bias.detach(), requires_grad=False)",
          "nn.Parameter(bias.detach())"),
    layer("mode of the linear forgotten", "return self.train(linear.training)", "return self"),
    layer("adapter in the weight's dtype", "adapter_dtype or self.weight.dtype",
          "self.weight.dtype"),
    # PEFT's layers
    peft("dropout of the layer's mode", "if dropped and dropout.training else 0.0",
         "if dropped and layer.training else 0.0", "test_peft.py -k own_training_flag"),
    peft("bias of B unscaled", "elif bias_b is not None: bias_b = bias_b * scaling",
         "elif bias_b is not None:\n        pass", "test_peft.py::test_equals_peft -k lora_bias"),
    peft("bias of B unscaled by a tensor", "None if bias_b is None else bias_b * scaling", "bias_b",
         "test_peft.py::test_scaling_of_the_moment"),
    peft("Conv1D as Linear", "weight if kind is nn.Linear else weight.t()", "weight",
         "test_peft.py::test_equals_peft -k conv1d"),
    peft("merged and fused", "if layer.merged_adapters:", "if False:",
         "test_peft_fallback.py::test_falls_back"),
    peft("pre-hook overlooked", "module._forward_pre_hooks or", "",
         "test_peft_fallback.py::test_falls_back"),
    peft("backward hook overlooked", "or module._backward_hooks", "",
         "test_peft_fallback.py::test_falls_back"),
    peft("trained weight taken as frozen", "if weight.requires_grad and", "if False and",
         "test_peft_fallback.py::test_falls_back"),
    peft("fp32 adapters on fp16", "dtype == torch.float16 and x is not None", "False",
         "test_peft_fallback.py::test_falls_back"),
    peft("autocast overlooked", 'return torch.get_autocast_dtype(x.device.type), ""',
         'return dtype, ""', "test_peft.py -k fused_under_autocast"),
    layer("merged weight trains", "nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)",
          "nn.Parameter(merged.to(self.weight.dtype))"),
    layer("state dict of a merged layer is attached", "frozen if keep_vars else frozen.detach()",
          "frozen"),
    group("group op: x kept only if every A trains",
          "kept = x if any(a.requires_grad for a in lora_as) else None ctx.save_for_backward(kept, "
          "*weights, *lora_as, *lora_bs, *hs, *seeds) ctx.mark",
          "kept = x if all(a.requires_grad for a in lora_as) else None\n    ctx.save_for_backward("
          "kept, *weights, *lora_as, *lora_bs, *hs, *seeds)\n    ctx.mark",
          "test_faults_shapes.py -k keeps_x_for_any"),
    backend("16-bit part not told", "_native = dtypes", "pass"),
    backend("16-bit part not told to C++",
            "OPS.use_16bit_gemm(torch.bfloat16 in dtypes, torch.float16 in dtypes)", "pass"),
    # what the choice by shape takes a call for
    ops("rows of the first dimension", "m = x.numel() // k if k else 0", "m = x.shape[0]",
        f"{CALLS} -k rows"),
    ops("plans outlive the evidence", "backends.on_change(make_plan.cache_clear)", "",
        f"{CALLS} -k comes_later"),
    group("group: plans outlive the evidence", "backends.on_change(make_plan.cache_clear)", "",
          f"{CALLS} -k comes_later"),
    call("training without the bias", "inputs = (x, lora_a, lora_b, bias)",
         "inputs = (x, lora_a, lora_b)", f"{CALLS} -k single"),
    call("compiled: forward alone of a trained bias",
         "not needs_grad(x, lora_a, lora_b, bias): name", "not needs_grad(x, lora_a, lora_b): name",
         f"{CALLS} -k compiled-bias"),
    group("group: training of x alone", "training = ops.needs_grad(x, *operands) if operands",
          "training = ops.needs_grad(x) if operands", f"{CALLS} -k grouped"),
    group("compiled group: forward alone of trained biases",
          "not ops.needs_grad(x, *lora_as, *lora_bs, *biases)",
          "not ops.needs_grad(x, *lora_as, *lora_bs)", f"{CALLS} -k compiled_group"),
    explained("explain: every call trains",
              "training = ops.needs_grad(x, lora_a, lora_b, bias)", "training = True"),
    explained("explain: an adapter that is off has a rank",
              "off = ops.is_off(scaling, dropout.drop_threshold(dropout_p))", "off = False"),
    # rounding, seeds, fakes and what is off
    reference("reference: h not rounded",
              "h = (scaling * torch.nn.functional.linear(wide_x, a)).to(x.dtype)",
              "h = scaling * torch.nn.functional.linear(wide_x, a)", ROUNDED),
    reference("reference: h rounded before it is scaled",
              "h = (scaling * torch.nn.functional.linear(wide_x, a)).to(x.dtype)",
              "h = scaling * torch.nn.functional.linear(wide_x, a).to(x.dtype)", ROUNDED),
    dropout("mask: seeds of 8 bits", "torch.randint(0, 2**63 - 1,", "torch.randint(0, 2**8,",
            DRAWN),
    dropout("mask: draws for a threshold of 0", "return p > 0.5 / RANGE",
            "return p >= 0.5 / RANGE", "test_dropout.py -k draws_nothing"),
    ops("fake: backward_as wide of A for B",
        "b = lora_b.float() if wide_b else lora_b return _fake_grads(x, a, b, need_x,",
        "b = lora_b.float() if wide_a else lora_b\n    return _fake_grads(x, a, b, need_x,",
        FAKES),
    group("fake: backward_group wide of A for B", "((lora_as, wide_a), (lora_bs, wide_b))",
          "((lora_as, wide_a), (lora_bs, wide_a))", FAKES),
    ops("op: autocast of the CPU alone", '("AutocastCPU", "AutocastCUDA")', '("AutocastCPU",)',
        FAKES),
    ops("off: dx although nobody asks", "h, None, on, need_x, False, False, need_bias",
        "h, None, on, True, False, False, need_bias", "test_faults_shapes.py -k take_no_memory"),
]  # fmt: skip

"""Planted bugs in the CUDA operators of csrc/torch, which run on CPU tensors (tests/cuda_ops)."""

from __future__ import annotations

from mutants_cpu import of
from mutants_python import PackageMutant

FILE = "test_cuda_operators.py"
forward = of("torch/cuda.cpp", FILE)
backward = of("torch/cuda_backward.cpp", FILE)
group = of("torch/cuda_group.cpp", FILE)
operands = of("torch/cuda_operands.h", FILE)
call = of("torch/cuda_call.h", FILE)

CPU_NAMED: list[PackageMutant] = [
    # forward
    forward("mask of exchanged sizes", "mask.mutable_data_ptr()), rows, cols,",
            "mask.mutable_data_ptr()), cols, rows,"),
    forward("mask of negative sizes", "STD_TORCH_CHECK(rows >= 0 && cols >= 0,",
            "STD_TORCH_CHECK(rows >= 0 || cols >= 0,"),
    forward("h of down_proj as wide as x", "empty_like(x, {args.M, args.r})",
            "empty_like(x, {args.M, args.K})"),
    forward("no 1/q in fused_gemm", "bias, scale * inverse_keep(dropout), op);",
            "bias, scale, op);"),
    forward("no mask in fused_gemm", "args.dropout = dropout;", ""),
    forward("workspace of fused_gemm of half", "workspace(place_packed(plan), x)",
            "workspace(place_packed(plan) / 2, x)"),
    forward("h of y is not that of A", "call.args.down.h.data = call.args.gemm.h.data =",
            "call.args.down.h.data ="),
    forward("workspace of forward not taken", "workspace(plan.workspace_bytes, x);",
            "workspace(0, x);"),
    forward("sm80 taken for one launch", 'form == "sm80" ? "two_launches" : form',
            'form == "sm80" ? "one_launch" : form'),
    forward("any form", "STD_TORCH_CHECK(form_of(name, &request.form),",
            "STD_TORCH_CHECK(form_of(name, &request.form) || true,"),
    forward("tiles that are asked for forgotten",
            'request.gemm = gemm_request_of(tile_n, group, "forward_as");',
            'gemm_request_of(tile_n, group, "forward_as");'),
    forward("plan of any form", "target_of(x, form), request_of(form, tile_n, group)));",
            "target_of(x, form), request_of(\"\", tile_n, group)));"),
    forward("device of fused_gemm not made current", "OnDeviceOf device(x);\n  const Target target "
            "= target_of(x);\n  Tensor y", "const Target target = target_of(x);\n  Tensor y"),
    forward("launch of down_proj not looked at",
            "check_launch(launch_down_proj(args, plan, current_stream(x)), \"down_proj\", args.M, "
            "args.r);", "launch_down_proj(args, plan, current_stream(x));"),
    forward("no stream of x", "plan, workspace.data(), target, current_stream(x)), op,\n"
            "               call.args", "plan, workspace.data(), target, nullptr), op,\n"
            "               call.args"),
    forward("no plan of down_proj's own device",
            "return describe(plan_down_proj(args, target_of(x)));",
            "return describe(plan_down_proj(args, {80, 132, false}));"),
    # backward
    backward("rows of h unchecked", 'check_size(ranks.rows, rows.rows, op, "h.size(0)");', ""),
    backward("h of any dtype", 'check_cuda_operand(ranks, x, rows.matrix.dtype, op, "h");', ""),
    backward("float32", 'check_cuda_operand(rows, x, rows.matrix.dtype, op, "x");', ""),
    backward("seed of weight_grad of any device", "check_seed_device(seed, x, op);", ""),
    backward("gradient transposed or not", "transpose ? transposed(to).matrix : to.matrix",
             "to.matrix"),
    backward("no 1/q in weight_grad", "static_cast<float>(scale * inverse_keep(dropout)),",
             "static_cast<float>(scale),"),
    backward("gradient never wide", "std::vector{r, K}, wide);", "std::vector{r, K}, false);"),
    backward("workspace of weight_grad", "workspace(place_weight_grad(pass, plan), x)",
             "workspace(place_weight_grad(pass, plan) / 2, x)"),
    backward("needs exchanged", "call.needs(need_x, need_a, need_b, need_bias); BackwardArgs",
             "call.needs(need_x, need_b, need_a, need_bias);\n  BackwardArgs"),
    backward("wide exchanged", "call.give(da, db, dbias, wide_a, wide_b);",
             "call.give(da, db, dbias, wide_b, wide_a);"),
    backward("dA as wide as dB", "empty_grad(x, need_a, {args.r, args.K}, wide_a)",
             "empty_grad(x, need_a, {args.r, args.K}, wide_b)"),
    backward("dB transposed", "{args.N, args.r}, wide_b)", "{args.r, args.N}, wide_b)"),
    backward("dx as wide as dy", "{dx.mutable_data_ptr(), args.K, 1, call.x.matrix.dtype};",
             "{dx.mutable_data_ptr(), args.N, 1, call.x.matrix.dtype};"),
    backward("dx that nobody needs", "need_x ? sizes_of_y(x, args.K) : std::vector<int64_t>{0}",
             "sizes_of_y(x, args.K)"),
    backward("workspace of backward", "workspace(plan.workspace_bytes, x)",
             "workspace(plan.workspace_bytes / 2, x)"),
    backward("sm80 taken for one grid", 'form == "sm80" ? "passes" : form',
             'form == "sm80" ? "one_grid" : form'),
    backward("scales of backward exchanged", "lora_b, &h, seed, threshold,\n"
             "                    h_scale, up_scale);", "lora_b, &h, seed, threshold,\n"
             "                    up_scale, h_scale);"),
    # groups
    group("six projections", "count <= kMaxGroup", "count <= kMaxGroup + 1"),
    group("biases of the first", "lora_bs[i], biases[i], seeds[i], threshold,",
          "lora_bs[i], biases[0], seeds[i], threshold,"),
    group("masks of the first", "lora_bs[i], biases[i], seeds[i], threshold,",
          "lora_bs[i], biases[i], seeds[0], threshold,"),
    group("h of the first", "&hs[i], seeds[i],", "&hs[0], seeds[i],"),
    group("y of another's h", "a.down.h.data = a.gemm.h.data = hs[i].mutable_data_ptr();",
          "a.down.h.data = a.gemm.h.data = hs[0].mutable_data_ptr();"),
    group("scales of the first", "threshold, h_scales[i], up_scales[i]);\n    BackwardCall",
          "threshold, h_scales[0], up_scales[i]);\n    BackwardCall"),
    group("dA where the first asks", "call.needs(need_x, need_a[i],",
          "call.needs(need_x, need_a[0],"),
    group("dB as wide as the first", "need_b[i], {a.N, a.r}, wide_b[i])",
          "need_b[i], {a.N, a.r}, wide_b[0])"),
    group("dx of a group as wide as dy", "a.dx = {dx.mutable_data_ptr(), a.K, 1,",
          "a.dx = {dx.mutable_data_ptr(), a.N, 1,"),
    group("no workspace of backward",
          "const Workspace workspace(plan.workspace_bytes, x); check_launch( launch_backward",
          "const Workspace workspace(0, x);\n  check_launch(\n      launch_backward"),
    group("another device",
          "OnDeviceOf device(x); const Operand rows = flatten_rows(x, op, \"x\"); std",
          "const Operand rows = flatten_rows(x, op, \"x\");\n  std"),
    # operands
    operands("width of A unchecked",
             "check_size(down.cols, x.cols, op, (std::string(name) + \".size(1)\").c_str());", ""),
    operands("A of any device", "check_cuda_operand(down, x.tensor, x.matrix.dtype, op, name);",
             ""),
    operands("seed of h of any device",
             "check_seed_device(seed, x.tensor, op); const Dropout dropout = dropout_of(seed, "
             "threshold, op); const Matrix h",
             "const Dropout dropout = dropout_of(seed, threshold, op);\n  const Matrix h"),
    operands("no 1/q in h", "static_cast<float>(scale * inverse_keep(dropout)),",
             "static_cast<float>(scale),"),
    operands("gemm unchecked", "check_gemm(x, weight, h, up, op);", ""),
    operands("1/q on one gradient alone", "static_cast<float>(up_scale * inverse_keep(dropout));",
             "static_cast<float>(up_scale);"),
    operands("wide of A for B", "wide_b ? Dtype::f32 : dtype};", "wide_a ? Dtype::f32 : dtype};"),
    # around a launch
    call("any device", "STD_TORCH_CHECK(o.tensor.device() == like.device(), op,",
         "STD_TORCH_CHECK(true, op,"),
]  # fmt: skip
KILLED = [m._replace(name=m.name.replace("cpu ", "cuda operators: ", 1)) for m in CPU_NAMED]

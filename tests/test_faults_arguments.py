"""Faults 1 to 11, 41 and 42 of docs/reliability.md: bad arguments have their message, none crashes.

Those of adapter files, 43, are in test_adapter_safety.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_kernels as lk

SPEC = dict(x=(5, 8), weight=(6, 8), lora_a=(3, 8), lora_b=(6, 3), bias=(6,))


def call(**changes):
    """A good call with some arguments replaced; a tuple stands for a tensor of that shape."""
    args = {**SPEC, **changes}
    tensors = {k: torch.randn(*v) if isinstance(v, tuple) else v for k, v in args.items()}
    names = ("x", "weight", "lora_a", "lora_b", "bias")
    return lk.fused_lora_linear(
        *(tensors[n] for n in names), **{k: v for k, v in tensors.items() if k not in names}
    )


def refused(message: str, error: type[Exception] = ValueError, **changes) -> None:
    with pytest.raises(error, match=f"^fused_lora_linear: .*{message}"):
        call(**changes)


def test_the_call_that_the_refusals_start_from_is_good():
    assert call().shape == (5, 6)


def test_fault_01_x_width():
    refused(r"x.size\(-1\) = 7 must equal weight.size\(1\) = 8", x=(5, 7))
    refused(r"x.size\(-1\) = 6.*; it looks transposed: pass weight.t\(\)", x=(5, 6))


@pytest.mark.parametrize("shape", [(3, 9), (24,), (3, 8, 1)], ids=str)
def test_fault_02_lora_a_shape(shape):
    got = re.escape(str(list(shape)))
    refused(rf"lora_a must be \[r, in_features=8\], but got {got}$", lora_a=shape)


@pytest.mark.parametrize("shape", [(6, 4), (18,)], ids=str)
def test_fault_02_lora_b_shape(shape):
    got = re.escape(str(list(shape)))
    refused(rf"lora_b must be \[out_features=6, r=3\], but got {got}$", lora_b=shape)


def test_fault_02_transposed_adapters():
    refused(r"it looks transposed: pass lora_a.t\(\)", lora_a=(8, 3))
    refused(r"it looks transposed: pass lora_b.t\(\)", lora_b=(3, 6))


@pytest.mark.parametrize("shape", [(48,), (0,), (1, 6, 8)], ids=["flat", "empty", "3d"])
def test_fault_03_weight_that_is_no_matrix(shape):
    got = re.escape(str(list(shape)))
    refused(
        rf"weight must be \[out_features, in_features\], but got shape {got}: the parameter looks "
        "sharded, flattened or packed; unshard or dequantise it first",
        weight=shape,
    )


def test_fault_04_dtensor_beside_tensors():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        weight = DTensor.from_local(torch.randn(6, 8), mesh, [Replicate()])
        refused("got DTensor for weight.*pass local tensors", TypeError, weight=weight)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias", "seed"])
def test_fault_05_devices(name):
    if name == "seed":
        other = torch.zeros(2, dtype=torch.int64, device="meta")
    else:
        other = torch.empty(SPEC[name], device="meta")
    message = f"x is on cpu but {name} is on meta; move it with {name}.to"
    refused(message, **{name: other}, dropout_p=0.1)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
def test_fault_06_unsupported_dtypes(name, dtype):
    operand = torch.zeros(SPEC[name]).to(dtype)
    refused(f"dtype {dtype} is not supported for {name}; use float16", **{name: operand})


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fault_07_dtype_combinations(low):
    ok = {k: torch.randn(*v).to(low) for k, v in SPEC.items()}
    wide = {k: torch.randn(*SPEC[k]) for k in ("lora_a", "lora_b")}
    assert call(**ok).dtype == low
    assert call(**(ok | wide)).dtype == low
    for name in ("weight", "bias"):
        message = f"{name} must have x's dtype {low}, but got torch.float32"
        refused(message, **(ok | {name: torch.randn(*SPEC[name])}))
    refused(f"weight must have x's dtype torch.float32, but got {low}", weight=ok["weight"])
    refused("lora_a must have x's dtype torch.float32, or float32 with", lora_a=ok["lora_a"])
    double = ok | {"lora_b": wide["lora_b"].double()}
    refused(f"lora_b must have x's dtype {low}.*but got torch.float64", **double)
    with torch.autocast("cpu", dtype=low):
        assert call().dtype == low
        assert call(weight=ok["weight"]).dtype == low
        refused("lora_a must have x's dtype", lora_a=torch.randn(3, 8, dtype=torch.float64))


def test_fault_08_weight_that_requires_grad():
    weight = torch.randn(6, 8, requires_grad=True)
    message = r"weight requires grad.*weight.requires_grad_\(False\), or use .*linear"
    refused(message, RuntimeError, weight=weight)
    with torch.no_grad():
        assert call(weight=weight).shape == (5, 6)


@pytest.mark.parametrize("shape", [(5,), (1, 6)], ids=["length", "2d"])
def test_fault_09_bias_shape(shape):
    got = re.escape(str(list(shape)))
    refused(rf"bias must be \[out_features=6\], but got {got}", bias=shape)


def test_fault_09_bias_gradient_is_the_column_sum(backend):
    operands = [torch.randn(*SPEC[n]) for n in ("x", "weight", "lora_a", "lora_b")]
    bias = torch.randn(6, requires_grad=True)
    dy = torch.randn(5, 6)
    lk.fused_lora_linear(*operands, bias, backend=backend).backward(dy)
    torch.testing.assert_close(bias.grad, dy.sum(0))


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_fault_10_scaling_must_be_finite(scaling):
    refused(f"scaling must be finite.*, but got {re.escape(str(scaling))}", scaling=scaling)


def test_fault_10_scaling_types():
    message = r"scaling must be a number, but got a Tensor.*lora_b \* scaling"
    refused(message, TypeError, scaling=torch.tensor(2.0))
    refused("scaling must be a number, but got str", TypeError, scaling="2")
    refused("scaling must be a number, but got bool", TypeError, scaling=True)
    assert call(scaling=2).shape == (5, 6)


def test_fault_10_negative_scaling(backend):
    args = [torch.randn(*SPEC[n]) for n in ("x", "weight", "lora_a", "lora_b")]
    plus, minus = (lk.fused_lora_linear(*args, scaling=s, backend=backend) for s in (2.0, -2.0))
    torch.testing.assert_close(plus + minus, 2 * torch.nn.functional.linear(*args[:2]))


def check_a_term_that_is_off(backend, compiled, **off):
    """Inf and NaN in the adapter would make the LoRA term NaN if it were multiplied by zero."""
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    a = torch.full((3, 8), torch.nan).requires_grad_()
    b = torch.full((6, 3), torch.inf).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    f = lk.fused_lora_linear
    if compiled:
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    y = f(x, w, a, b, bias, backend=backend, **off)
    dy = torch.randn(5, 6)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    dx, da, db, dbias = torch.autograd.grad(y, (x, a, b, bias), dy)
    torch.testing.assert_close((dx, dbias), (dy @ w, dy.sum(0)))
    assert torch.equal(da, torch.zeros_like(a)) and torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "op"])
def test_fault_10_scaling_zero_is_exactly_the_base(backend, compiled):
    check_a_term_that_is_off(backend, compiled, scaling=0.0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "op"])
def test_fault_11_dropout_one_is_exactly_the_base(backend, compiled):
    check_a_term_that_is_off(backend, compiled, dropout_p=1.0)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_fault_11_dropout_probability(p):
    refused(f"dropout probability has to be between 0 and 1, but got {p}", dropout_p=p)


def test_fault_11_dropout_type():
    refused("dropout_p must be a number, but got", TypeError, dropout_p="0.1")


@pytest.mark.parametrize(
    "seed",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)],
    ids=["length", "dtype", "dims"],
)
def test_malformed_seed(seed):
    refused(r"seed must be an int64 tensor \[2\] = \(seed, offset\)", seed=seed, dropout_p=0.1)


@pytest.mark.parametrize("name", list(SPEC))
def test_arguments_that_are_no_tensors(name):
    for bad in ([[1.0]], 3.0) + (() if name == "bias" else (None,)):
        refused(f"{name} must be a Tensor, but got {type(bad).__name__}", TypeError, **{name: bad})


# ---- quantised weights: PEFT's layers with one fall back, the op has no such base ----------------


class PackedParameter(nn.Parameter):
    """As bitsandbytes' Params4bit: a Parameter whose data is packed."""


def packed(*shape: int, dtype=torch.uint8) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


NF4 = {  # 6 * 8 weights of 4 bits, as bitsandbytes stores them in each of its quant_storage dtypes
    "uint8": packed(24, 1),
    "bf16": packed(12, 1, dtype=torch.bfloat16),
    "fp32": packed(6, 1, dtype=torch.float32),
    "parameter": PackedParameter(packed(24, 1), requires_grad=False),
}


@pytest.mark.parametrize("weight", NF4.values(), ids=NF4)
def test_fault_41_packed_weight_without_its_quant_state(weight):
    got = re.escape(f"{weight.dtype} {list(weight.shape)}")
    refused(
        rf"weight looks like packed 4-bit data \({got} for \[out_features=6, in_features=8\]\), "
        "but no quantised base is served; dequantise it first, or apply.* to PEFT's layer",
        weight=weight,
    )


def test_fault_41_a_narrow_weight_is_not_taken_for_a_packed_one():
    column = dict(weight=(6, 1), lora_a=(3, 1))
    refused(r"x.size\(-1\) = 8 must equal weight.size\(1\) = 1$", **column)
    assert call(x=(5, 1), **column).shape == (5, 6)


OTHER_FORMATS = {
    "gptq": (packed(1, 6, dtype=torch.int32), "looks like packed 4-bit data"),
    "awq": (packed(8, 6, dtype=torch.uint8)[:, :3], "looks like packed 4-bit data"),
    "flat": (packed(24), "looks like packed 4-bit data"),
    "int8": (packed(6, 8, dtype=torch.int8), "dtype torch.int8 is not supported for weight"),
    "fp8": (packed(6, 8).to(torch.float8_e5m2), "dtype torch.float8_e5m2 is not supported for w"),
    "3_bits": (packed(18, 1), r"x.size\(-1\) = 8 must equal weight.size\(1\) = 1"),
}


@pytest.mark.parametrize("weight, message", OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_fault_42_quantised_weights_of_other_formats(weight, message):
    refused(message, weight=weight)


class Quantised(torch.Tensor):
    """As torchao's: a float [N, K] to look at, without memory of that shape and dtype."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {op} of a quantised tensor")


def test_fault_42_a_weight_without_memory_is_never_read(backend):
    weight = Quantised(packed(6, 8))
    with pytest.raises(NotImplementedError, match="of a quantised tensor"):
        call(weight=weight, backend=backend)


# ---- arguments of other calls, and what is not numbered ------------------------------------------


def test_backend_must_be_a_name():
    for bad in (3, torch.ones(2), []):
        with pytest.raises(TypeError, match="backend must be a name or None, but got"):
            call(backend=bad)


@pytest.mark.parametrize("bad", ["0.1", None, True, torch.tensor(0.1)])
def test_probabilities_must_be_numbers(bad):
    with pytest.raises(TypeError, match="keep_probability: p must be a number, but got"):
        lk.keep_probability(bad)
    with pytest.raises(TypeError, match="dropout_mask: p must be a number, but got"):
        lk.dropout_mask([1, 2], (5, 8), bad)


@pytest.mark.parametrize("bad", [3, "ab", (2.5, 1), torch.tensor(1.0), None])
def test_shape_and_seed_of_a_mask_must_be_integers(bad):
    with pytest.raises(TypeError, match="dropout_mask: shape must be a sequence of integers"):
        lk.dropout_mask([1, 2], bad, 0.5)
    if not isinstance(bad, torch.Tensor):
        with pytest.raises(TypeError, match="dropout_mask: seed must be a sequence of integers"):
            lk.dropout_mask(bad, (5, 8), 0.5)


def test_words_of_a_seed_have_64_bits():
    for word in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="dropout_mask: seed must hold 64-bit integers, but"):
            lk.dropout_mask([1, word], (5, 8), 0.5)


BAD_LAYERS = {
    "r": [2.5, "4", None, -1, True],
    "lora_dropout": ["0.1", None, 1.5, float("nan"), True],
    "lora_alpha": ["16", float("nan"), float("inf"), 10**400, True],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD_LAYERS.items() for v in vs])
def test_arguments_of_a_layer(name, value):
    with pytest.raises(ValueError, match=f"LoRALinear: {name} must be .*, but got"):
        lk.LoRALinear(8, 6, **({"r": 4} | {name: value}))


TAKES_A_MODEL = {
    "convert_model": lk.convert_model,
    "inject": lambda model: lk.inject(model, r=2, target_modules=["0"]),
    "load_adapter": lambda model: lk.load_adapter(model, "."),
    "save_adapter": lambda model: lk.save_adapter(model, "."),
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_a_model_must_be_a_module(name):
    for bad in (None, [nn.Linear(2, 2)], nn.Linear):
        with pytest.raises(TypeError, match=f"{name}: model must be a torch.nn.Module, but got"):
            TAKES_A_MODEL[name](bad)


def group_call(**changes):
    """The same as a group of one."""
    tensors = {k: changes.get(k, torch.randn(v)) for k, v in SPEC.items()}
    x, *each = tensors.values()
    return lk.fused_lora_linear_group(x, *([t] for t in each), scalings=1.0)[0]


LAYOUTS = {
    "sparse": torch.Tensor.to_sparse,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "jagged": lambda t: torch.nested.nested_tensor([t], layout=torch.jagged),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPEC)
def test_fault_06_a_tensor_that_is_not_strided(name, layout):
    """Of a good call nothing is asked but its shapes and dtypes: the kernels refuse it first."""
    bad = {name: LAYOUTS[layout](torch.randn(SPEC[name]))}
    said = rf"{name} must not be nested; pass its values\(\)"
    if layout in ("sparse", "mkldnn"):
        said = rf"{name} must be strided, but got torch\.\w+; pass {name}\.to_dense\(\)"
    refused(said, TypeError, **bad)
    refused(said, TypeError, **bad, scaling=2)
    with pytest.raises(TypeError, match=f"^fused_lora_linear_group: projection 0: {said}"):
        group_call(**bad)


@pytest.mark.parametrize("name", SPEC)
def test_fault_06_fake_tensors_beside_real_ones(name):
    with FakeTensorMode() as mode:
        fake = {k: torch.randn(v) for k, v in SPEC.items()}
    refused(f"got FakeTensor for {name}, but needs all", TypeError, **{name: fake[name]})
    with FakeTensorMode():
        other = torch.randn(SPEC[name])
    refused("got FakeTensor for .*of one FakeTensorMode", TypeError, **(fake | {name: other}))
    assert call(**fake).fake_mode is mode


@pytest.mark.parametrize("left", [0, 96], ids=["freed", "cut"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_a_tensor_without_its_memory_is_refused(name, left):
    """FSDP frees the storage of a parameter that it has sharded, and its sizes stay."""
    t = torch.randn(SPEC[name])
    t.untyped_storage().resize_(min(left, t.nbytes // 2))
    with pytest.raises(RuntimeError, match="its storage of"):
        call(**{name: t}, backend="cpu")


@pytest.mark.parametrize("p", [float("inf"), 7.0, -1.0])
def test_the_operator_alone_refuses_what_is_no_probability(p):
    tensors = [torch.randn(SPEC[n]) for n in ("x", "weight", "lora_a", "lora_b")]
    with pytest.raises(ValueError, match="lora_linear: dropout probability has to be between"):
        torch.ops.lora_kernels.lora_linear(*tensors, None, torch.tensor([1, 2]), 1.0, p, "composed")

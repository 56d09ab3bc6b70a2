"""Bad input to `fused_lora_linear`: a cheap test on the hot path, a clear message when it fails."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from . import autocast

OP = "fused_lora_linear"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SCALING = 2.0**112  # times 1/q, at most 2**14, it is still finite in fp32
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
CAST = DTYPES[:3]  # by autocast, which leaves fp64 alone
_PLAIN = (Tensor, Parameter)
_NUMBERS: Any = (Real, torch.SymFloat, torch.SymInt)


def compute_dtype(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed) -> torch.dtype | None:
    """The dtype of the usual good call; None where it is unsure, which is for `validate`."""
    if type(x) is not Tensor or type(weight) not in _PLAIN:
        return None
    if type(lora_a) not in _PLAIN or type(lora_b) not in _PLAIN:
        return None
    if bias is not None and type(bias) not in _PLAIN:
        return None
    try:
        width = x.shape[-1]
        n, k = weight.shape
        r, k_a = lora_a.shape
        n_b, r_b = lora_b.shape
        of_bias = None if bias is None else bias.shape
    except (IndexError, ValueError, RuntimeError):  # other dimensions, or those of a nested tensor
        return None
    dtype, device, adapter = x.dtype, x.device, lora_a.dtype
    if not (
        width == k == k_a
        and n == n_b
        and r == r_b
        and dtype in DTYPES
        and lora_b.dtype is adapter
        and weight.device == device
        and lora_a.device == device
        and lora_b.device == device
        and (bias is None or (of_bias == (n,) and bias.device == device))
        and not (weight.requires_grad and torch.is_grad_enabled())
        and type(scaling) is float
        and -MAX_SCALING <= scaling <= MAX_SCALING
        and type(dropout_p) is float
        and 0.0 <= dropout_p <= 1.0
        and seed is None
    ):
        return None
    if not autocast.enabled(device.type):
        if weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
            return None
    elif dtype in CAST and weight.dtype in CAST and (bias is None or bias.dtype in CAST):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        return None
    if adapter is dtype or (adapter is torch.float32 and dtype in SIXTEEN_BIT):
        return dtype
    return None


def validate(
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, *, sharded: bool = False
) -> None:
    """Raises the error that a bad call deserves; returns for a good one.

    Args:
        sharded: DTensors are served, all of them or none.

    Raises:
        TypeError: an argument is of the wrong type, or a DTensor that is not served.
        ValueError: a shape, device, dtype, probability or scaling that cannot be served.
        RuntimeError: the frozen weight requires grad.
    """
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    for name, extra in (("bias", bias), ("seed", seed)):
        if extra is not None:
            tensors[name] = extra
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {name} must be a Tensor, but got {type(t).__name__}")
        if t.is_nested:
            raise TypeError(f"{OP}: {name} must not be nested; pass its values()")
        if t.layout is not torch.strided:
            raise TypeError(
                f"{OP}: {name} must be strided, but got {t.layout}; pass {name}.to_dense()"
            )
    _check_no_mixed_dtensor(tensors, sharded)
    _check_no_mixed_fake(tensors)
    _check_scalars(scaling, dropout_p)
    _check_not_packed(weight, lora_a, lora_b)
    _check_shapes(x, weight, lora_a, lora_b, bias)
    for name, t in tensors.items():
        if t.device != x.device:
            raise ValueError(
                f"{OP}: all tensors must be on one device; x is on {x.device} but {name} is on "
                f"{t.device}; move it with {name}.to(x.device)"
            )
    _check_dtypes(x, weight, lora_a, lora_b, bias)
    if seed is not None:
        from .dropout import check_seed

        check_seed(seed, OP)
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{OP}: weight requires grad, but this op treats it as frozen and gives it "
            "no gradient; call weight.requires_grad_(False), or use torch.nn.functional.linear to "
            "train it"
        )


def _check_scalars(scaling, dropout_p) -> None:
    if isinstance(scaling, Tensor):
        raise TypeError(
            f"{OP}: scaling must be a number, but got a Tensor; pass scaling=1.0 and "
            "lora_b * scaling"
        )
    if isinstance(scaling, bool) or not isinstance(scaling, _NUMBERS):
        raise TypeError(f"{OP}: scaling must be a number, but got {type(scaling).__name__}")
    if not -MAX_SCALING <= scaling <= MAX_SCALING:  # NaN fails the comparison too
        raise ValueError(
            f"{OP}: scaling must be finite and at most 2**112 in magnitude, but got {scaling}"
        )
    from .dropout import check_probability

    check_probability(dropout_p, OP, "dropout_p")


def _check_not_packed(weight, lora_a, lora_b) -> None:
    """Two weights of 4 bits a byte, as bitsandbytes, GPTQ and AWQ keep them in any dtype."""
    if lora_a.dim() != 2 or lora_b.dim() != 2:
        return
    n, k = lora_b.shape[0], lora_a.shape[1]
    # A column of floats is bitsandbytes' quant_storage; other floats of that size are shards.
    column = weight.dim() == 2 and weight.shape[1] == 1
    of_4_bits = 2 * weight.numel() * weight.element_size() == n * k != 0
    if of_4_bits and (column or not weight.is_floating_point()):
        raise ValueError(
            f"{OP}: weight looks like packed 4-bit data ({weight.dtype} {list(weight.shape)} for "
            f"[out_features={n}, in_features={k}]), but no quantised base is served; dequantise it "
            "first, or apply lora_kernels to PEFT's layer, which then runs as PEFT's own"
        )


def _check_shapes(x, weight, lora_a, lora_b, bias) -> None:
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have at least one dimension, but got a 0-d tensor")
    if weight.dim() != 2:
        raise ValueError(
            f"{OP}: weight must be [out_features, in_features], but got shape "
            f"{list(weight.shape)}: the parameter looks sharded, flattened or packed; unshard or "
            "dequantise it first"
        )
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(
            f"{OP}: x.size(-1) = {x.shape[-1]} must equal weight.size(1) = {k}"
            + _transposed_hint(x.shape[-1] == n, "weight")
        )
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(
            f"{OP}: lora_a must be [r, in_features={k}], but got {list(lora_a.shape)}"
            + _transposed_hint(lora_a.dim() == 2 and lora_a.shape[0] == k, "lora_a")
        )
    r = lora_a.shape[0]
    if lora_b.dim() != 2 or lora_b.shape[0] != n or lora_b.shape[1] != r:
        raise ValueError(
            f"{OP}: lora_b must be [out_features={n}, r={r}], but got {list(lora_b.shape)}"
            + _transposed_hint(tuple(lora_b.shape) == (r, n), "lora_b")
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"{OP}: bias must be [out_features={n}], but got {list(bias.shape)}")


def _transposed_hint(swapped: bool, name: str) -> str:
    return f"; it looks transposed: pass {name}.t()" if swapped else ""


def _check_dtypes(x, weight, lora_a, lora_b, bias) -> None:
    for name, t in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dtype not in DTYPES:
            raise ValueError(
                f"{OP}: dtype {t.dtype} is not supported for {name}; use float16, bfloat16, "
                "float32 or float64"
            )
    device = x.device.type
    # fp64 is left alone by autocast, as by F.linear
    cast = autocast.enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None or t.dtype == dtype or (cast and t.dtype in CAST):
            continue
        raise ValueError(
            f"{OP}: {name} must have x's dtype {dtype}, but got {t.dtype}; convert one of them, or "
            "run under torch.autocast"
        )
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dtype != dtype and not (t.dtype == torch.float32 and dtype in SIXTEEN_BIT):
            raise ValueError(
                f"{OP}: {name} must have x's dtype {dtype}, or float32 with a 16-bit x, but got "
                f"{t.dtype}"
            )


def is_sharded(x: Tensor) -> bool:
    """Whether a validated call is one of DTensors."""
    if type(x) in _PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _check_no_mixed_dtensor(tensors, sharded: bool) -> None:
    if all(type(t) in _PLAIN for t in tensors.values()):
        return
    from torch.distributed.tensor import DTensor

    kinds = {name: isinstance(t, DTensor) for name, t in tensors.items()}
    which = [name for name, is_dtensor in kinds.items() if is_dtensor]
    if not which:
        return
    plain = [name for name in kinds if name not in which and name != "seed"]
    if sharded and not plain:
        return
    if sharded:
        raise TypeError(
            f"{OP}: got DTensor for {', '.join(which)} and plain tensors for {', '.join(plain)}, "
            "but needs DTensors for all of them or for none: distribute the plain ones "
            "(parallelize_module with lora_kernels.distributed.ColwiseLoRA or RowwiseLoRA does it "
            "for a LoRALinear), or pass local tensors; under FSDP2 call the module that "
            "fully_shard was given, which gathers its parameters"
        )
    raise TypeError(
        f"{OP}: got DTensor for {', '.join(which)}, which only fused_lora_linear itself serves; "
        "call it for each projection, or pass local tensors (for example inside "
        "torch.distributed.tensor.experimental.local_map)"
    )


def _check_no_mixed_fake(tensors) -> None:
    """torch's own refusal is an AssertionError from within the operator."""
    if all(type(t) in _PLAIN for t in tensors.values()):
        return
    modes = {name: t.fake_mode for name, t in tensors.items() if isinstance(t, FakeTensor)}
    some = next(iter(modes.values()), None)
    if some is None or some.allow_non_fake_inputs:
        return
    if len(modes) < len(tensors) or any(mode is not some for mode in modes.values()):
        raise TypeError(
            f"{OP}: got FakeTensor for {', '.join(modes)}, but needs all tensors to be fake, of "
            "one FakeTensorMode, or none; convert the others with its from_tensor"
        )

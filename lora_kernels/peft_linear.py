"""`FusedLoraLinear`: PEFT's lora.Linear through `fused_lora_linear`, where that is the same.

Only `forward` is overridden. `operands` is the gate: it says what the call takes, or why it is
PEFT's own. It looks at everything anew at each call, since PEFT lets all of it change at run time:
adapters, scaling, dropout, hooks, merging. What it does not know is PEFT's.

Source: peft/tuners/lora/layer.py, Linear.forward of PEFT 0.18 to 0.21, of which it computes

    result = base_layer(x)
    result = result + lora_B(lora_A(dropout(x))) * scaling      for the active adapter
    return result.to(dtype of base_layer(x))
"""

from __future__ import annotations

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from . import autocast, checks
from .functional import fused_lora_linear

OLDEST = (0, 18)
TESTED = ("0.18.1", "0.21.2")  # all between them have the same forward
_LINEAR_FORWARD, _CONV1D_FORWARD = nn.Linear.forward, Conv1D.forward
_STAND_INS = (FakeTensor, FunctionalTensor)  # of plain tensors, while torch.export traces
_FORWARD_DIGEST = "f3f969ac2a1b"  # of that forward, without comments and white space


class Operands(NamedTuple):
    """Arguments of `fused_lora_linear` after x."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float


# ---- the gate ------------------------------------------------------------------------------------


def operands(layer: lora.Linear, x: Tensor | None = None) -> Operands | str:
    """What `fused_lora_linear` takes for layer(x), or why PEFT's own forward serves it.

    Without x: as far as the layer alone tells.
    """
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "merged: the base layer alone computes it"
    modules: Any = layer._modules
    adapters = modules["lora_A"]._modules
    name = layer._active_adapter
    if type(name) is not str:
        active = [n for n in name if n in adapters]
        if len(active) != 1:
            return f"{len(active) or 'no'} active adapters"
        name = active[0]
    elif name not in adapters:
        return "no active adapters"
    if name in layer.lora_variant:
        return "the adapter is a variant of LoRA (DoRA, aLoRA, ...)"

    base, down, up = modules["base_layer"], adapters[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    kind, dropped = type(base), type(dropout) is nn.Dropout
    if kind is not nn.Linear and kind is not Conv1D:
        return "the base layer is neither nn.Linear nor Conv1D"
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return "lora_A or lora_B is not nn.Linear"
    if not dropped and type(dropout) is not nn.Identity:
        return "the dropout is neither nn.Dropout nor nn.Identity"
    if _replaced(base) or _replaced(down) or _replaced(up) or _replaced(dropout):
        return "a hook or a forward of its own is on the base layer, lora_A, lora_B or dropout"
    if torch_module._has_any_global_hook():
        return "torch.nn.modules.module has a global hook"
    if nn.Linear.forward is not _LINEAR_FORWARD or Conv1D.forward is not _CONV1D_FORWARD:
        return "nn.Linear.forward or Conv1D.forward was replaced"

    (weight, bias), (lora_a, bias_a), (lora_b, bias_b) = _held(base), _held(down), _held(up)
    for t in (weight, lora_a, lora_b, bias, bias_b):
        if t is not None and not _plain(t):
            return "a weight or bias is not a plain tensor (quantised; a DTensor, gathered or not)"
    p = float(dropout.p) if dropped and dropout.training else 0.0
    # With dropout grad mode must not decide: reentrant checkpointing computes once without and
    # once with it, and PEFT's mask is another. FSDP1's frozen weights may require grad.
    if weight.requires_grad and (p > 0 or torch.is_grad_enabled()):
        return "the base weight requires grad, which the fused op treats as frozen"
    if bias_a is not None:
        return "lora_A has a bias"
    dtype, why = _compute_dtype(layer, weight, bias, x)
    if why or (why := _adapter_dtypes(dtype, lora_a, lora_b, x)):
        return why

    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):  # never read: that would wait for the device
        if scaling.dim() != 0:
            return "scaling is a tensor of more than one number"
        lora_b = lora_b * scaling
        bias_b = None if bias_b is None else bias_b * scaling
        scaling = 1.0
    elif not -checks.MAX_SCALING <= scaling <= checks.MAX_SCALING:
        return "scaling is not finite"
    elif bias_b is not None:
        bias_b = bias_b * scaling
    if bias_b is not None:
        bias = (bias_b if bias is None else bias + bias_b).to(dtype)
    if type(scaling) is int:
        scaling = float(scaling)
    return Operands(weight if kind is nn.Linear else weight.t(), lora_a, lora_b, bias, scaling, p)


def _replaced(module: nn.Module) -> bool:
    """Whether calling the module is more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def _plain(t: Tensor) -> bool:
    kind = type(t)
    if kind is nn.Parameter or kind is Tensor:
        return True
    return kind in _STAND_INS and torch.compiler.is_compiling()


def _held(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias), faster than nn.Module.__getattr__ where that would look."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    except KeyError:  # FSDP1 and DataParallel hold tensors as plain attributes
        return module.weight, module.bias  # type: ignore[return-value]


def _compute_dtype(layer, weight, bias, x) -> tuple[torch.dtype, str]:
    """(the dtype of base_layer(x), "") or (any, why the call is not for the fused op)."""
    dtype = weight.dtype
    if dtype not in checks.CAST:
        return dtype, f"{dtype} is not a dtype of the fused op"
    if weight.layout is not torch.strided or weight.is_meta:
        return dtype, "the base weight is sparse or on the meta device"
    if x is None:
        return dtype, ""
    if not _plain(x) or x.layout is not torch.strided or x.is_nested:
        return dtype, "x is not a plain tensor"
    if x.dim() == 0 or x.shape[-1] != layer.in_features or x.device != weight.device:
        return dtype, "x is not [..., in_features] on the weight's device"
    if _transformed():
        return dtype, "inside torch.func, forward-mode differentiation or torch.jit.trace"
    if autocast.enabled(x.device.type):
        if x.dtype not in checks.CAST:
            return dtype, f"autocast leaves {x.dtype} alone"
        return torch.get_autocast_dtype(x.device.type), ""
    if x.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return dtype, "x, the base weight and its bias differ in dtype"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return dtype, "PEFT's casting of the input is switched off"
    return dtype, ""


def _adapter_dtypes(dtype: torch.dtype, lora_a: Tensor, lora_b: Tensor, x: Tensor | None) -> str:
    """Why not, if the fused op would not compute with the adapter as PEFT does."""
    adapter = lora_a.dtype
    if lora_b.dtype != adapter:
        return "lora_A and lora_B differ in dtype"
    if adapter == dtype:
        return ""
    if adapter != torch.float32 or dtype not in checks.SIXTEEN_BIT:
        if x is None and adapter in checks.SIXTEEN_BIT:
            return f"the adapter is {adapter}, the base {dtype}: fused under autocast alone"
        return f"the adapter's {adapter} is neither float32 nor the base's {dtype}"
    if dtype == torch.float16 and x is not None and not autocast.enabled(x.device.type):
        return "float32 adapters on a float16 base keep their range, unless autocast gives it up"
    return ""


def _transformed() -> bool:
    """Whether a function transform, not autograd, will differentiate what is computed now."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


# As torch.compiler.assume_constant_result does, which imports all of the compiler: the state while
# a call is traced is the state that it will run in.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- the layer -----------------------------------------------------------------------------------


def fused_forward(self: lora.Linear, x: Tensor, *args, **kwargs) -> Tensor:
    """`forward` of a lora.Linear: `fused_lora_linear`, or PEFT's own where the gate says so."""
    found = "arguments beside x" if args or kwargs else operands(self, x)
    if isinstance(found, str):
        return peft_forward()(self, x, *args, **kwargs)
    weight, lora_a, lora_b, bias, scaling, dropout_p = found
    return fused_lora_linear(x, weight, lora_a, lora_b, bias, scaling=scaling, dropout_p=dropout_p)


class FusedLoraLinear(lora.Linear):
    """A lora.Linear at the price of its base layer: same parameters, state dict, save and merge.

    `lora_kernels.apply` makes one of each lora.Linear of a model by its class alone. x [..., K] ->
    [..., N] as lora.Linear; DoRA and other variants, several active adapters, adapter_names,
    merged or disabled adapters, quantised and trained base weights, hooks on the modules inside,
    DTensor and float64 are PEFT's own forward (`lora_kernels.report` says which and why).

    float32 adapters on a 16-bit base are cast to it inside, their gradients are float32; PEFT casts
    x up instead. The dropout mask is `lora_kernels.dropout_mask`'s, drawn from torch's generator.

    Equivalent to::

        result = base_layer(x)
        result = result + lora_B(lora_A(dropout(x))) * scaling
    """

    forward = fused_forward


# ---- the forward of PEFT -------------------------------------------------------------------------

_own: Callable | None = None  # lora.Linear.forward before `patch` replaced it


def peft_forward() -> Callable:
    """PEFT's own lora.Linear.forward, patched or not."""
    return _own or lora.Linear.forward


def patched() -> bool:
    """Whether lora.Linear.forward is `fused_forward`, or was wrapped by somebody since."""
    return _own is not None and lora.Linear.forward is not _own


def patch() -> None:
    """lora.Linear.forward = fused_forward."""
    global _own
    if not patched():
        _own = lora.Linear.forward
        lora.Linear.forward = fused_forward  # type: ignore[method-assign]


def unpatch() -> None:
    """lora.Linear.forward as it was before `patch`.

    Raises:
        RuntimeError: it is not patched, or somebody has replaced it since.
    """
    global _own
    if not patched():
        _own = None
        raise RuntimeError(
            "unpatch_peft: PEFT is not patched; call lora_kernels.patch_peft() first"
        )
    if lora.Linear.forward is not fused_forward:
        raise RuntimeError(
            "unpatch_peft: peft.tuners.lora.Linear.forward is "
            f"{getattr(lora.Linear.forward, '__module__', '?')}."
            f"{getattr(lora.Linear.forward, '__qualname__', '?')}, which replaced the fused one "
            "after patch_peft(); undo that first"
        )
    lora.Linear.forward, _own = _own, None  # type: ignore[method-assign, assignment]


def check_version() -> None:
    """Whether this is a PEFT whose forward the gate knows.

    Raises:
        ImportError: PEFT is older than `OLDEST`.

    Warns:
        UserWarning: its forward is none that was tested, because PEFT is newer or somebody has
            replaced it.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", peft.__version__)[:2])
    if found < OLDEST:
        raise ImportError(
            f"lora_kernels: peft {peft.__version__} is older than {OLDEST[0]}.{OLDEST[1]}, the "
            "oldest whose lora.Linear is known here; pip install -U peft"
        )
    if forward_digest(peft_forward()) != _FORWARD_DIGEST:
        warnings.warn(
            f"lora_kernels: lora.Linear.forward of peft {peft.__version__} is not the one of "
            f"{TESTED[0]} to {TESTED[-1]} (newer, or replaced by another library). Layers are "
            "fused as that one would compute; compare a loss curve, or pin peft",
            stacklevel=4,
        )


def forward_digest(function: Callable) -> str:
    """Of a function's source without comments and white space; "" if it has none."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(re.sub(r"#.*|\s+", "", source).encode()).hexdigest()[:12]

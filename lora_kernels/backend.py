"""Which backend serves a call, and why the others do not.

A backend is a pair of functions with the signatures of `lora_kernels::forward` and `::backward`
(`schemas`), whose operands share one dtype. `register` is the seam: the C++ backends fill it as
soon as their library registers those two ops for a device.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import composed, dispatch
from ._ops import ops as OPS
from .schemas import CAPABILITY, EXTENSION_ERROR, LIBRARY, has_kernel
from .shape_classes import Call
from .triton_kernels import device as triton_device

ENV = "LORA_KERNELS_BACKEND"
FORWARD_ALONE = "automatic forward"  # what "" is to the operators, where no backward will follow


@dataclass(frozen=True)
class Backend:
    """One way to run the op.

    Args:
        name: what the `backend` argument calls it.
        summary: one line on what it runs.
        forward, backward: as `composed.forward` and `composed.backward`.
        group_forward, group_backward: the same for projections that share x, as `forward_group` and
            `backward_group` of `schemas`; by default one projection after the other.
        missing: None if it can run on this machine, else what is missing and how to get it.
        refuses: None if it serves an x of this kind, else why not.
        prefers: None if the automatic choice may take it for such an x, else why not.
        eager_like: whether it rounds frozen products of this dtype before it adds the rank-r term,
            as eager PyTorch does: the criterion's bound for it.
        evidence: what is known by measurement on a device; if there, the automatic choice takes
            the backend for calls that it has won alone.
        plan: what the forward pass would launch for (x, weight, lora_a, lora_b, seed, up_scale),
            all of x's dtype, for `explain`; by default `summary`.
    """

    name: str
    summary: str
    forward: Callable
    backward: Callable
    missing: Callable[[], str | None] = lambda: None
    refuses: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    prefers: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    eager_like: Callable[[torch.dtype], bool] = lambda dtype: False
    evidence: Callable[[torch.device], dispatch.Evidence] | None = None
    plan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], str] | None = None
    group_forward: Callable | None = None
    group_backward: Callable | None = None


_REGISTRY: dict[str, Backend] = {}
_ORDER = ["cuda", "cpu", "triton", "composed", "reference"]
_LISTENERS: list[Callable[[], None]] = []
_selected: str | None = None


def register(backend: Backend, before: str = "composed") -> None:
    """Adds a backend, ahead of `before` in the automatic order, or replaces the one of its name."""
    _REGISTRY[backend.name] = backend
    if backend.name not in _ORDER:
        _ORDER.insert(_ORDER.index(before), backend.name)
    _changed()


def unregister(name: str) -> None:
    """Takes a registered backend away again."""
    _ORDER.remove(name)
    del _REGISTRY[name]
    _changed()


def on_change(listener: Callable[[], None]) -> None:
    """Calls `listener` whenever a backend comes or goes: caches of choices must be dropped then."""
    _LISTENERS.append(listener)


def _changed() -> None:
    for listener in _LISTENERS:
        listener()


dispatch.on_reload(_changed)


def selected() -> str | None:
    """The name given to `use_backend` or LORA_KERNELS_BACKEND; None: the choice is automatic."""
    return _selected


def requested(name: str | None) -> str:
    """The backend that a call's argument asks for, else the `selected`; "": it is to be chosen.

    Raises:
        TypeError: it is no name.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"fused_lora_linear: backend must be a name or None, but got {type(name).__name__}"
        )
    return name or _selected or ""


class use_backend:
    """Forces a backend for every call that names none, from now on or within a `with` block.

    Args:
        name: a backend's name, or None for the automatic choice.

    Raises:
        TypeError: it is no name. ValueError: there is no such backend. RuntimeError: it cannot
            run here.
    """

    def __init__(self, name: str | None):
        global _selected
        if name is not None:
            requested(name)
            _named(name)
        self._name, self._outer, self._fresh = name, [_selected], True
        _selected = name

    def __enter__(self) -> use_backend:
        global _selected
        # `with use_backend(...)` restores what preceded it; entered later, what is selected then
        if not (self._fresh and _selected == self._name):
            self._outer.append(_selected)
        self._fresh, _selected = False, self._name
        return self

    def __exit__(self, *exc) -> None:
        global _selected
        _selected = self._outer.pop()


def choose(
    name: str, device: torch.device, dtype: torch.dtype, call: Call | None = None
) -> Backend:
    """The backend for such an x: `name`, which must serve or raise, or by the fixed order if "".

    `call`: what the choice by shape needs; without it, what serves where no shape class was won.
    """
    if name in ("", FORWARD_ALONE):
        return _REGISTRY[_chosen(device, dtype, call, call is not None and dispatch.many_ranks())]
    found = _named(name)
    why = found.refuses(device, dtype)
    if why is not None:
        raise RuntimeError(
            f"fused_lora_linear: backend={name!r} was asked for but cannot serve this call: {why}; "
            "pass backend=None for the best that can"
        )
    return found


def _named(name: str) -> Backend:
    if name not in _REGISTRY:
        raise ValueError(
            f"fused_lora_linear: unknown backend {name!r}; expected None or one of "
            f"{', '.join(_REGISTRY)}"
        )
    found = _REGISTRY[name]
    why = found.missing()
    if why is not None:
        raise RuntimeError(f"fused_lora_linear: backend {name!r} cannot run here: {why}")
    return found


@functools.lru_cache(maxsize=4096)
def _chosen(device: torch.device, dtype: torch.dtype, call: Call | None, many_ranks: bool) -> str:
    """`automatic`, remembered until a backend or the evidence changes, or other ranks come."""
    return automatic(device, dtype, call)[0]


on_change(_chosen.cache_clear)


def automatic(
    device: torch.device, dtype: torch.dtype, call: Call | None = None
) -> tuple[str, dict[str, str]]:
    """The first backend of the order that serves, and why those before it do not."""
    passed_over: dict[str, str] = {}
    for name in _ORDER:
        backend = _REGISTRY[name]
        why = _objection(name, device, dtype)
        if why is None and backend.evidence is not None:
            won, found = backend.evidence(device).find(dtype, call)
            why = None if won else found
        if why is None:
            return name, passed_over
        passed_over[name] = why
    raise RuntimeError(f"fused_lora_linear: no backend serves {dtype} on {device}: {passed_over}")


def by_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the automatic choice for such an x depends on more than that."""
    for name in _ORDER:
        if _objection(name, device, dtype) is None:
            evidence = _REGISTRY[name].evidence
            if evidence is None:
                return False
            if evidence(device).steers(dtype):
                return True
    return False


def _objection(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the automatic choice cannot take a backend for such an x, whatever its shape."""
    backend = _REGISTRY[name]
    why = backend.missing() or backend.refuses(device, dtype) or backend.prefers(device, dtype)
    if dtype == torch.float64 and name != "reference":
        why = why or "float64 goes to the reference"
    return why


def eager_like(name: str, dtype: torch.dtype) -> bool:
    """`Backend.eager_like` of a backend."""
    return _REGISTRY[name].eager_like(dtype)


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run here, else what is missing and how to get it."""
    return {name: _REGISTRY[name].missing() for name in _ORDER}


# ---- the backends of this package ----------------------------------------------------------------

_REBUILD = "reinstall with a C++ compiler on PATH: pip install --no-build-isolation lora-kernels"


def _cpu_missing() -> str | None:
    if has_kernel("forward", "CPU"):
        return None
    return f"the C++ extension is not loaded ({EXTENSION_ERROR}); {_REBUILD}"


def _cpu_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"x is on {device}, not on the CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {dtype} kernels"
    return None


_native: tuple[torch.dtype, ...] = ()  # of 16 bits, those that backend cpu multiplies as they are


def multiply_natively(*dtypes: torch.dtype) -> None:
    """Hands frozen products of these dtypes to the vendor's 16-bit CPU GEMM, others to its fp32."""
    global _native
    OPS.use_16bit_gemm(torch.bfloat16 in dtypes, torch.float16 in dtypes)
    _native = dtypes


def native_dtypes() -> list[torch.dtype]:
    """The 16-bit dtypes that this processor's GEMM takes as they are."""
    probes = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    ops = torch.ops.mkldnn
    return [dtype for dtype, name in probes.items() if hasattr(ops, name) and getattr(ops, name)()]


def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not has_kernel("down_proj", "CUDA"):
        return (
            "the extension was built without nvcc; set CUDA_HOME and reinstall with "
            "LORA_KERNELS_BUILD=cuda"
        )
    return None


def _on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"x is on {device}, not on a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {dtype} kernels"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "its kernels need compute capability 8.0"
    return None


def _raising_as_torch(run: Callable) -> Callable:
    """The stable ABI keeps only the words of an error: its type is what callers catch and retry."""

    @functools.wraps(run)
    def wrapper(*args):
        try:
            return run(*args)
        except RuntimeError as error:
            if not str(error).startswith("CUDA out of memory"):
                raise
            raise torch.OutOfMemoryError(str(error)) from None

    return wrapper


def _cuda_flow() -> dict[str, Callable]:
    forward, backward, forward_group, backward_group = map(
        _raising_as_torch,
        (OPS.forward.default, OPS.backward.default, OPS.forward_group.default,
         OPS.backward_group.default),
    )  # fmt: skip
    group_forward, group_backward = composed.sliced_flow(
        forward_group, backward_group, OPS.max_group
    )
    return dict(
        forward=forward,
        backward=backward,
        group_forward=group_forward,
        group_backward=group_backward,
    )


_CUDA_SUMMARY = "C++/CUDA down_proj, fused_gemm and weight_grad: of sm_90a on Hopper, else of sm_80"


def _cuda_plan(x, weight, lora_a, lora_b, seed, up_scale) -> str:
    call = (x, weight, lora_a, lora_b, seed, "", 0, 0, up_scale)
    return f"forward: {OPS.forward_plan(*call)}; backward: {OPS.backward_plan(*call)}"


def _triton(name: str) -> Callable:
    """A function of triton_kernels/flow.py, which imports Triton once it is called."""

    def run(*args):
        from .triton_kernels import flow

        return getattr(flow, name)(*args)

    return run


for _name in ("forward", "backward"):
    LIBRARY.impl(f"{_name}_triton", _triton(_name), "CompositeExplicitAutograd")


def _triton_flow() -> dict[str, Callable]:
    forward = OPS.forward_triton.default
    backward = OPS.backward_triton.default
    group_forward, group_backward = composed.group_flow(forward, composed.adding(backward))
    return dict(
        forward=forward,
        backward=backward,
        group_forward=group_forward,
        group_backward=group_backward,
    )


def _reference_only(*args):
    raise RuntimeError(
        "fused_lora_linear: backend 'reference' is plain PyTorch and has no operator"
    )


def _register_all() -> None:
    native = dict(
        forward=OPS.forward.default,
        backward=OPS.backward.default,
        group_forward=OPS.forward_group.default,
        group_backward=OPS.backward_group.default,
    )
    register(
        Backend("cuda", _CUDA_SUMMARY, **_cuda_flow(), missing=_cuda_missing, refuses=_on_cuda,
                evidence=dispatch.evidence, plan=_cuda_plan)
    )  # fmt: skip
    register(
        Backend("cpu", "C++ down_proj and weight_grad, mask in registers, frozen product by the "
                "vendor's GEMM", **native, missing=_cpu_missing, refuses=_cpu_refuses,
                eager_like=lambda dtype: dtype in _native)
    )  # fmt: skip
    register(
        Backend("triton", "Triton down_proj, fused_gemm and weight_grad, for any GPU that Triton "
                "serves", **_triton_flow(), refuses=triton_device.refuses,
                prefers=triton_device.prefers, plan=_triton("plan"),
                missing=triton_device.missing,
                evidence=functools.partial(dispatch.evidence, backend="triton"))
    )  # fmt: skip
    register(
        Backend("composed", "the vendor's GEMMs, up projection accumulated in place by addmm",
                composed.forward, composed.backward, eager_like=lambda dtype: True,
                group_forward=composed.group_forward, group_backward=composed.group_backward)
    )  # fmt: skip
    register(
        Backend("reference", "plain PyTorch, accumulated in fp32 (fp64 for fp64)", _reference_only,
                _reference_only)
    )  # fmt: skip


_register_all()
if has_kernel("forward", "CPU"):
    multiply_natively(*native_dtypes())
if os.environ.get(ENV):
    _selected = os.environ[ENV]

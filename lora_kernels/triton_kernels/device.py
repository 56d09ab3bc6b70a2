"""What a device and this Triton offer, one small check each."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .. import composed
from . import digest

CAPABILITY = (8, 0)  # of the oldest NVIDIA GPU that Triton serves
OLDEST = (3, 6)
MOST = 2**31 - 1024  # rows or columns: tiles are placed by 32 bits
SPECIALISED = 16  # numbers that it divides are known to be so when a kernel is compiled
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def missing() -> str | None:
    """None if Triton can run here, else what is missing and how to get it; imports nothing."""
    version = digest.triton_version()
    if not version:
        return "Triton is not installed: pip install triton"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return "Triton is {}, expected {}.{} or newer: pip install -U triton".format(
            version, *OLDEST
        )
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no GPU; with TRITON_INTERPRET=1, set before Python starts, a CPU runs it"
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernels serve an x of this kind, else why not."""
    if dtype not in DTYPES:
        return f"it has no {dtype} kernels"
    if interpreted():
        if device.type != "cpu":
            return f"TRITON_INTERPRET is set, which runs the kernels on a CPU; x is on {device}"
        if dtype == torch.bfloat16 and not interpreter_knows_bfloat16():
            return (
                "Triton's interpreter multiplies bfloat16 as if it were integers (triton#11584); "
                "take float16 or float32"
            )
        return None
    if device.type != "cuda":
        return f"x is on {device}, not on a GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "Triton needs compute capability 8.0"
    return None


def prefers(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the automatic choice may take the kernels for such an x, else why not."""
    if dtype == torch.float32 and cuts_to_tf32():
        return "float32 is measured without TF32, which torch.backends.cuda.matmul allows"
    return None


@functools.cache
def interpreter_knows_bfloat16() -> bool:
    from .probe import product_is_right

    return product_is_right()


@functools.cache
def family(device: torch.device) -> str:
    """Whose rows of configs.json count: by architecture and shared memory."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_descriptors(device: torch.device) -> bool:
    """Whether tiles can be loaded by TMA: a GPU that has it, and host descriptors in Triton."""
    return family(device) in ("sm90", "sm100", "interpreter") and _descriptor_class() is not None


@functools.cache
def _descriptor_class() -> Callable | None:
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor


def descriptor(tensor: Tensor, block: list[int]):
    """Of a 2-D tensor whose last dimension is contiguous, by blocks [rows, columns]."""
    make = _descriptor_class()
    assert make is not None, "has_descriptors was not asked"
    return make(tensor, list(tensor.shape), list(tensor.stride()), block)


def describable(tensor: Tensor) -> bool:
    """Whether TMA can address a 2-D tensor: 16-byte rows, contiguous columns, 32-bit sizes."""
    rows, cols = tensor.shape
    row, col = tensor.stride()
    return (
        col == 1
        and row * tensor.element_size() % 16 == 0
        and cols <= row
        and tensor.data_ptr() % 16 == 0
        and 0 < rows < 2**31
        and 0 < cols < 2**31
    )


def loads_vectors(tensor: Tensor) -> bool:
    """Whether Triton can tell that the rows of a matrix are whole vectors of 16 bytes."""
    row, col = tensor.stride()
    return (
        col == 1
        and row % SPECIALISED == 0
        and tensor.shape[1] % SPECIALISED == 0
        and tensor.data_ptr() % SPECIALISED == 0
    )


def precision(x: Tensor) -> str:
    """Of products in tl.dot: fp32 operands are cut to TF32 where torch's GEMMs cut them too."""
    return "tf32" if x.dtype == torch.float32 and cuts_to_tf32() else "ieee"


def cuts_to_tf32() -> bool:
    """Whether the user lets fp32 GEMMs on a GPU multiply in TF32, by either of torch's flags."""
    if torch.version.hip is not None:  # has no such instruction
        return False
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def launching_on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: makes it x's."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def rows_of(x: Tensor) -> Tensor:
    """`composed.rows_of`, for the kernels.

    Raises:
        RuntimeError: rows or columns are too many for the kernels to count.
    """
    x = composed.rows_of(x)
    if max(x.shape) > MOST:
        raise RuntimeError(
            f"fused_lora_linear: backend 'triton' counts rows and columns up to {MOST}, but x is "
            f"{list(x.shape)} by rows; split the call, or pass backend='composed'"
        )
    return x

"""What a measurement holds for: the device, the versions around it, and the kernels' sources."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from ._ops import ops as OPS
from .schemas import has_kernel
from .triton_kernels import digest


class Machine(NamedTuple):
    """One device and what runs on it; the empty string where there is no such thing."""

    device: str  # its name
    capability: str  # "9.0"; of a CPU its instruction set, as torch calls it
    torch: str
    cuda: str  # that torch was built with; "HIP ..." of a build for ROCm
    driver: str
    package: str
    sources: str  # the hash of what the backend's kernels are made of; "" without such kernels

    @property
    def is_gpu(self) -> bool:
        return self.driver != ""


def sources(backend: str = "cuda") -> str:
    """The hash of Triton's kernels, or of the CUDA kernels in the library; "" if there are none."""
    if backend == "triton":
        return digest.sources()
    if not has_kernel("kernel_sources", "CompositeExplicitAutograd"):
        return ""
    return OPS.kernel_sources()


@functools.cache
def of(device: torch.device, backend: str = "cuda") -> Machine:
    """The facts of a device of this process, with the hash of a backend's kernels."""
    from . import __version__

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        capability, driver = f"{major}.{minor}", _driver()
    else:
        name, capability, driver = _cpu_name(), torch.backends.cpu.get_cpu_capability(), ""
    cuda = f"HIP {torch.version.hip}" if torch.version.hip else torch.version.cuda or ""
    versions = str(torch.__version__), cuda, driver, __version__
    return Machine(name, capability, *versions, sources(backend))


def differences(found: Machine, here: Machine) -> list[str]:
    """What of `found` is not so here, in words."""
    return [
        f"{name} {theirs[:16]!r}, here {ours[:16]!r}"
        if name == "sources"
        else f"{name} {theirs!r}, here {ours!r}"
        for name, theirs, ours in zip(Machine._fields, found, here, strict=True)
        if theirs != ours
    ]


def _driver() -> str:
    """The driver's release where Linux says it, else the CUDA version that it serves."""
    if torch.version.hip:  # a driver that is part of Linux has no release of its own
        own = _text("/sys/module/amdgpu/version").strip()
        return own or f"{platform.system()} {platform.release()}"
    text = _text("/proc/driver/nvidia/version")
    if found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text):
        return found[0]
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    return f"CUDA {version}"


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _text(path: str) -> str:
    """Of a file of Linux; "" where there is none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""

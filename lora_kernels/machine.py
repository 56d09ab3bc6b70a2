"""What a measurement holds for: the device, the versions around it, and the kernels' sources."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .schemas import has_kernel


class Machine(NamedTuple):
    """One device and what runs on it; the empty string where there is no such thing."""

    device: str  # its name
    capability: str  # "9.0"; of a CPU its instruction set, as torch calls it
    torch: str
    cuda: str  # that torch was built with
    driver: str
    package: str
    sources: str  # csrc/digest.py of what the kernels were built from; "" without CUDA kernels


def sources() -> str:
    """The hash of the CUDA kernels in the library; "" if it has none."""
    if not has_kernel("kernel_sources", "CompositeExplicitAutograd"):
        return ""
    return torch.ops.lora_kernels.kernel_sources()


@functools.cache
def of(device: torch.device) -> Machine:
    """The facts of a device of this process."""
    from . import __version__

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        capability, driver = f"{major}.{minor}", _driver()
    else:
        name, capability, driver = _cpu_name(), torch.backends.cpu.get_cpu_capability(), ""
    cuda = torch.version.cuda or ""
    return Machine(name, capability, str(torch.__version__), cuda, driver, __version__, sources())


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
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        text = ""
    if found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text):
        return found[0]
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    return f"CUDA {version}"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()

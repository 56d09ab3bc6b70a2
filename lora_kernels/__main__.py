"""`python -m lora_kernels`: what is built and usable here, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, backends
from .backend import ENV, automatic
from .schemas import EXTENSION_ERROR, has_kernel

OPS = (
    "dropout_mask", "down_proj", "fused_gemm", "weight_grad", "forward", "backward",
    "forward_group", "backward_group",
)  # fmt: skip


def _devices() -> list[torch.device]:
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *cuda]


def _environment(console: Console) -> None:
    console.print(f"lora_kernels {__version__}, torch {torch.__version__}, Python ", end="")
    console.print(f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        console.print(f"cuda:{i}: {torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    if EXTENSION_ERROR is not None:
        console.print(f"C++ extension: not loaded ({EXTENSION_ERROR})")
        return
    for key in ("CPU", "CUDA"):
        built = [op for op in OPS if has_kernel(op, key)]
        isa = f" ({torch.ops.lora_kernels.cpu_isa()})" if key == "CPU" else ""
        console.print(f"C++ kernels for {key}{isa}: {', '.join(built) or 'none'}")


def _backends(console: Console) -> None:
    table = Table("backend", "usable here", "otherwise", title="backends")
    for name, missing in backends().items():
        table.add_row(name, "yes" if missing is None else "no", missing or "")
    console.print(table)


def _choices(console: Console) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    table = Table("device", *(str(d).removeprefix("torch.") for d in dtypes))
    forced = os.environ.get(ENV)
    table.title = "the automatic choice" + (f" ({ENV}={forced} overrides it)" if forced else "")
    for device in _devices():
        row = []
        for dtype in dtypes:
            row.append(automatic(device, dtype)[0])
        table.add_row(str(device), *row)
    console.print(table)


def main() -> int:
    console = Console()
    _environment(console)
    _backends(console)
    _choices(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())

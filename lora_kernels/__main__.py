"""`python -m lora_kernels`: what is built and usable here, what is missing and how to get it.

`python -m lora_kernels selfcheck` checks and times the kernels on this machine: `selfcheck_cli`.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING

import torch

from . import __version__, backends, dispatch, verdicts
from ._ops import ops
from .backend import ENV, automatic, by_shape
from .schemas import EXTENSION_ERROR, has_kernel

if TYPE_CHECKING:
    from rich.console import Console

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
        isa = f" ({ops.cpu_isa()})" if key == "CPU" else ""
        console.print(f"C++ kernels for {key}{isa}: {', '.join(built) or 'none'}")


def _backends(console: Console) -> None:
    from rich.table import Table

    table = Table("backend", "usable here", "otherwise", title="backends")
    for name, missing in backends().items():
        table.add_row(name, "yes" if missing is None else "no", missing or "")
    console.print(table)


def _choices(console: Console) -> None:
    from rich.table import Table

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    table = Table("device", *(str(d).removeprefix("torch.") for d in dtypes))
    forced = os.environ.get(ENV)
    table.title = "the automatic choice" + (f" ({ENV}={forced} overrides it)" if forced else "")
    for device in _devices():
        row = []
        for dtype in dtypes:
            name = automatic(device, dtype)[0]
            row.append(f"by shape, else {name}" if by_shape(device, dtype) else name)
        table.add_row(str(device), *row)
    console.print(table)


def main() -> int:
    if sys.argv[1:2] == ["selfcheck"]:
        from . import selfcheck_cli

        return selfcheck_cli.main(sys.argv[2:])
    from rich.console import Console

    console = Console()
    _environment(console)
    _backends(console)
    _choices(console)
    if torch.cuda.is_available():
        for name in dispatch.MEASURED:
            said = f"{verdicts.remedy(name)}: checks {name} here, and lets what wins serve"
            console.print(said, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

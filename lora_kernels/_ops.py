"""The operators' namespace, spelled here and in csrc/torch/library.h alone, and the C++ library.

A build of kernel-builder has a namespace and a library of its own, and a file of its making, with
`ops` and `add_op_namespace_prefix`, in the place of this one (build.toml, docs/hub.md).
"""

from typing import Any

import torch

EXTENSION_ERROR: str | None = None
try:
    # its import registers the C++ kernels
    from . import _C  # type: ignore[attr-defined]  # noqa: F401
except ImportError as error:  # not built, or built for another system: every op still has Python
    EXTENSION_ERROR = str(error)

ops: Any = torch.ops.lora_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """namespace::op_name."""
    return f"{ops.name}::{op_name}"

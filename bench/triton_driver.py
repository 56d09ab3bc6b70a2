"""Drivers that stand in for a GPU's, so that Triton's launch path runs where there is none.

Kernels are compiled for the named target; operands are CPU tensors that nothing reads. For a
process of its own: `triton.runtime.driver.set_active` counts for all of it, and neither works once
Triton's interpreter was chosen.
"""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget

THREADS = 1024  # of a block, at most


class Named:
    """Knows its target and nothing else: what compiling needs."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


class Idle(Named):
    """Loads no binary and launches nothing: what is left is the host's work before the driver's."""

    def __init__(self, target: GPUTarget, shared: int):
        super().__init__(target)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, THREADS),
        )
        self.launcher_cls = lambda source, metadata: lambda *args: None

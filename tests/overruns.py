"""Mistakes that `guard_malloc.cpp` has to catch, each made in a child of this process.

Run with it preloaded; prints {name: [how the child ended, what it said]} as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import tempfile

import torch

import lora_kernels  # noqa: F401  the guard looks for its extension

BYTES = 33 * 65 * 2  # of a tensor that ends at no boundary
GUARD = ctypes.CDLL(None)


def tensor() -> torch.Tensor:
    found = torch.empty(33, 65, dtype=torch.bfloat16)
    assert found.nbytes == BYTES and found.isnan().all(), "it is filled with NaN"
    return found


def nothing():
    t = tensor()
    ctypes.memset(t.data_ptr(), 0, BYTES)


def write_past_the_end():
    t = tensor()
    ctypes.memset(t.data_ptr() + BYTES, 0, 2)


def read_past_the_end():
    t = tensor()
    ctypes.string_at(t.data_ptr() + BYTES, 2)


def write_before_the_start():
    t = tensor()
    ctypes.memset(t.data_ptr() - 2, 0, 2)
    del t


def read_once_freed():
    t = tensor()
    address = t.data_ptr()
    del t
    ctypes.string_at(address, 2)


def free_twice():
    t = tensor()
    address = ctypes.c_void_p(t.data_ptr())
    del t
    GUARD.free(address)


MISTAKES = (
    nothing, write_past_the_end, read_past_the_end, write_before_the_start, read_once_freed,
    free_twice,
)  # fmt: skip


def outcome(mistake) -> tuple[str, str]:
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            GUARD.guard_on(said.fileno())
            mistake()
            gc.collect()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return (signal.Signals(-status).name if status < 0 else str(status)), said.read()


if __name__ == "__main__":
    print(json.dumps({mistake.__name__: outcome(mistake) for mistake in MISTAKES}))

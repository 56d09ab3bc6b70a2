"""Where no GPU is, the Triton kernels run in Triton's interpreter, whose bfloat16 is mended here.

It keeps bfloat16 as uint16, which tl.dot multiplies as integers (triton#11584), and cuts float32 to
bfloat16 instead of rounding to nearest even. Both are replaced by what a GPU does; the kernels are
untouched. Imported by conftest.py before Triton is.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"


def mend() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widen(a), widen(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return handle(bits.reshape(src.data.shape), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


if INTERPRETED:
    try:
        mend()
    except ImportError:  # without Triton its backend says so
        INTERPRETED = False

"""The fakes of operators that only a GPU serves: shapes and dtypes, on meta tensors."""

from __future__ import annotations

import pytest
import torch

OPS = torch.ops.lora_kernels
LEAD, N, K, R = (2, 3), 5, 7, 4
NEEDS = (True, True, True, True)


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


X, WEIGHT, A, B = meta(*LEAD, K), meta(N, K), meta(R, K), meta(N, R)
H, DY = meta(6, R), meta(*LEAD, N)
FORWARD = (X, WEIGHT, A, B, None, None, 0, 1.0, 1.0)


def is_like(t: torch.Tensor, like: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    return t.shape == like.shape and t.dtype == dtype and t.device.type == "meta"


@pytest.mark.parametrize("name, form", [("forward_triton", ()), ("forward_as", ("sm80", 0, 0))])
def test_forward(name, form):
    y, h = getattr(OPS, name)(*FORWARD, *form)
    assert is_like(y, DY) and is_like(h, H)


@pytest.mark.parametrize("wide_a, wide_b", [(True, False), (False, True)], ids=["A", "B"])
@pytest.mark.parametrize("name, form", [("backward_triton", ()), ("backward_as", ("sm80", 0, 0))])
def test_backward_is_wide_where_it_is_asked_to(name, form, wide_a, wide_b):
    operands = (DY, X, WEIGHT, A, B, H, None, 0, 1.0, 1.0)
    dx, da, db, dbias = getattr(OPS, name)(*operands, wide_a, wide_b, *NEEDS, *form)
    assert is_like(dx, X) and is_like(dbias, meta(N))
    assert is_like(da, A, torch.float32 if wide_a else torch.bfloat16)
    assert is_like(db, B, torch.float32 if wide_b else torch.bfloat16)


def test_backward_of_a_group_is_wide_where_it_is_asked_to():
    lists = ([t, t] for t in (DY, WEIGHT, A, B, H))
    scalars = ([None, None], 0, [1.0, 1.0], [1.0, 1.0], [True, False], [False, True])
    needs = (True, *([True, True] for _ in range(3)))
    dx, das, dbs, _ = OPS.backward_group(X, *lists, *scalars, *needs)
    assert is_like(dx, X)
    assert [t.dtype for t in das] == [torch.float32, torch.bfloat16]
    assert [t.dtype for t in dbs] == [torch.bfloat16, torch.float32]


def test_autocast_casts_the_operator_on_a_gpu_too():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert has_kernel("lora_kernels::lora_linear", key), key

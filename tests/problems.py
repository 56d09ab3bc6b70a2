"""Problems that every backend must solve: shapes named after why they are there, and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from devices import moved
from torch import Tensor

import lora_kernels as lk

GRADS = ("x", "lora_a", "lora_b", "bias")

# name -> (M, N, K, r)
SHAPES = {
    "one_of_everything": (1, 1, 1, 1),
    "one_row": (1, 40, 24, 4),
    "one_fragment": (16, 16, 16, 16),
    "row_tail_of_fragment": (17, 16, 16, 8),
    "every_dim_odd": (33, 47, 65, 7),
    "rank_past_panel": (50, 31, 40, 17),
    "rank_3": (20, 24, 16, 3),
    "two_row_blocks_and_tail": (101, 64, 96, 16),
    "depth_past_block": (23, 20, 520, 8),
    "columns_past_unit": (10, 330, 70, 9),
    "rank_64": (40, 72, 80, 64),
    "rank_130": (30, 40, 50, 130),
    "rank_300": (12, 20, 24, 300),
    "few_columns_of_many_rows": (230, 9, 12, 3),
    "no_rank": (9, 10, 11, 0),
}
# Large enough that the C++ path leaves the small-problem branch and that norms are meaningful.
LARGE = {"large": (260, 140, 330, 16), "large_rank_33": (150, 300, 200, 33)}


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, in the dtypes they are stored in, and the upstream gradient."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def run(self, backend: str | None, x: Tensor | None = None) -> dict[str, Tensor]:
        """y and the four gradients by one backend."""
        leaves = [
            None if t is None else t.detach().clone().requires_grad_()
            for t in (self.x, self.lora_a, self.lora_b, self.bias)
        ]
        if x is not None:  # as it lies in memory, which a clone may not keep
            leaves[0] = x.detach().requires_grad_()
        y = lk.fused_lora_linear(
            leaves[0],
            self.weight,
            *leaves[1:],
            scaling=self.scaling,
            dropout_p=self.dropout_p,
            seed=self.seed,
            backend=backend,
        )
        inputs = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(y, inputs, self.dy))
        found = {n: next(grads) for n, t in zip(GRADS, leaves, strict=True) if t is not None}
        return {"y": y.detach()} | found

    def eager(self) -> dict[str, Tensor]:
        """PEFT's formula in eager PyTorch with the same cast adapters and the same mask."""
        dtype = self.x.dtype
        x, a, b = (
            t.detach().to(dtype).requires_grad_() for t in (self.x, self.lora_a, self.lora_b)
        )
        leaves = {"x": x, "lora_a": a, "lora_b": b}
        if self.bias is not None:
            leaves["bias"] = self.bias.detach().clone().requires_grad_()
        dropped = x
        if self.dropout_p > 0:
            mask = lk.dropout_mask(self.seed, x.shape, self.dropout_p)
            dropped = torch.where(mask, x / lk.keep_probability(self.dropout_p), 0)
        linear = torch.nn.functional.linear
        y = linear(x, self.weight, leaves.get("bias"))
        y = y + linear(linear(dropped, a), b) * self.scaling
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    scaling: float = 1.7,
    dropout_p: float = 0.0,
    bias: bool = True,
    lead: tuple[int, ...] | None = None,
    b_scale: float = 1.0,
    w_scale: float = 1.0,
    generator_seed: int = 0,
) -> Problem:
    """Normal data with W and A scaled so that base and LoRA term are of the size of x.

    `lead` replaces M by leading dimensions.
    """
    m, n, k, r = shape
    lead = (m,) if lead is None else lead
    g = torch.Generator().manual_seed(generator_seed + 7919 * m + 104729 * n + 1299709 * k + r)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=g) * scale).to(dtype)

    adapter = adapter_dtype or dtype
    return Problem(
        x=normal(*lead, k),
        weight=normal(n, k, scale=w_scale / max(k, 1) ** 0.5),
        lora_a=normal(r, k, scale=1 / max(k, 1) ** 0.5, dtype=adapter),
        lora_b=normal(n, r, scale=b_scale / max(r, 1) ** 0.5, dtype=adapter),
        bias=normal(n) if bias else None,
        dy=normal(*lead, n),
        scaling=scaling,
        dropout_p=dropout_p,
        seed=torch.tensor([1234 + r, 5]) if dropout_p > 0 else None,
    )


def make_exact(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> Problem:
    """Sparse {-1, 0, 1} data with s = 2, p = 1/2: all intermediates are integers bf16 holds."""
    m, n, k, r = shape
    g = torch.Generator().manual_seed(seed)

    def ternary(*size: int, keep: int) -> Tensor:
        values = torch.randint(-1, 2, size, generator=g)
        # `keep` non-zeros in a row bound every sum below 2**8, so no rounding can happen
        order = torch.rand(*size, generator=g).argsort(-1)
        return torch.where(order < keep, values, 0).to(dtype)

    return Problem(
        x=ternary(m, k, keep=4),
        weight=ternary(n, k, keep=4),
        lora_a=ternary(r, k, keep=3),
        lora_b=ternary(r, n, keep=1).t().contiguous(),
        bias=ternary(1, n, keep=3)[0],
        dy=ternary(m, n, keep=2),
        scaling=2.0,
        dropout_p=0.5,
        seed=torch.tensor([seed, 3]),
    )


def sharded(problem: Problem, row0: int, col0: int) -> Problem:
    """The same problem as the part of a larger matrix that starts at (row0, col0)."""
    seed = torch.tensor([*problem.seed[:2].tolist(), row0, col0])
    return replace(problem, seed=seed)


def on_device(problem: Problem) -> Problem:
    """The same on the current CUDA device."""
    found = {n: moved(v, "cuda") for n, v in vars(problem).items() if isinstance(v, Tensor)}
    return replace(problem, **found)


def run_on_device(problem: Problem, backend: str | None) -> dict[str, Tensor]:
    """`run` there, with results on the CPU, where the oracle is."""
    return {name: t.cpu() for name, t in on_device(problem).run(backend).items()}


def check_rows_past_2_31_elements(backend: str, k: int) -> None:
    """Offsets of x and y past 2^31: the last rows are right."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    m, n = (1 << 20) + 300, 2048
    g = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(m, k, generator=g, device="cuda", dtype=torch.bfloat16)
    w, a, b = (
        torch.randn(*s, generator=g, device="cuda", dtype=torch.bfloat16) / s[1] ** 0.5
        for s in ((n, k), (16, k), (n, 16))
    )
    y = lk.fused_lora_linear(x, w, a, b, backend=backend)
    last = lk.fused_lora_linear(x[-64:].contiguous(), w, a, b, backend="composed")
    assert (y[-64:].double() - last.double()).norm() <= 1e-2 * last.double().norm()

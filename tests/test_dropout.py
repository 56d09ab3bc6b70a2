"""The mask: its specification, published Philox vectors, the same bits in each implementation."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

import lora_kernels as lk
from lora_kernels import dropout

ALL_ONES = 0xFFFFFFFF
# Random123's known answers for philox4x32 with 7 rounds: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "4dfccaba 190a87f0 c47362ba b6b5242a",
    ),
]
WINDOWS = [(1, 1), (16, 16), (17, 33), (50, 64), (100, 203), (3, 1000), (0, 5), (5, 0)]
SEEDS = [
    [0, 0],
    [5, 7],
    [-3, 2**40 + 9],
    [2**62, -1],
    [9, 1, 0, 0],
    [9, 1, 16, 32],
    [9, 1, 5, 37],
    [9, 1, 2**33 - 200, 2**34 - 1100],
]


def signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.fixture(scope="session")
def mask_module(compiled):
    """The CUDA kernel's source, run on the host."""
    return compiled("mask_module")


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_philox_known_answers(mask_module, counter, key, expected):
    offset, seed = signed(*counter[2:]), signed(*key)
    words = dropout._philox(*map(torch.tensor, ([counter[0]], [counter[1]], offset, seed)))
    assert " ".join(f"{w.item():08x}" for w in words) == expected
    words = mask_module.philox(counter[0], counter[1], offset % 2**64, seed % 2**64)
    assert " ".join(f"{w:08x}" for w in words) == expected


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 9, 2**64 - 1])
def test_philox_is_torchs_generator(mask_module, seed):
    """With torch's ten rounds, in place of our seven, it is torch's own engine."""
    for low, high in [(0, 0), (3, 7), (2**33 + 1, 2**50 + 3), (2**64 - 1, 2**64 - 1)]:
        ours, theirs = mask_module.philox10(low, high, seed)
        assert ours == theirs


def test_specification_element_by_element():
    """The docstring's definition in plain Python integers, against the PyTorch mask."""
    seed, offset, row0, col0, p = -17, 2**35 + 3, 1000, 2**20 + 5, 0.37
    got = lk.dropout_mask([seed, offset, row0, col0], (40, 50), p)
    for i in range(0, 40, 3):
        for j in range(50):
            row, col = row0 + i, col0 + j
            c0, c1 = col // 16 * 4 + col % 8 // 2, row // 16 * 8 + row % 8
            c2, c3 = offset % 2**32, offset // 2**32 % 2**32
            k0, k1 = seed % 2**32, seed // 2**32 % 2**32
            for _ in range(7):
                p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
                c0, c1, c2, c3 = (
                    p1 >> 32 ^ c1 ^ k0,
                    p1 & ALL_ONES,
                    p0 >> 32 ^ c3 ^ k1,
                    p0 & ALL_ONES,
                )
                k0, k1 = (k0 + 0x9E3779B9) & ALL_ONES, (k1 + 0xBB67AE85) & ALL_ONES
            word = (c0, c1, c2, c3)[row // 8 % 2 + 2 * (col // 8 % 2)]
            bits = word >> 16 * (col % 2) & 0x3FFF
            assert got[i, j].item() == (bits >= round(p * 16384)), (i, j)


def test_groups_are_the_fragments_of_mma():
    """Lane 4g+t of m16n8k16 holds of A, in register order: (g, 2t..), (g+8, 2t..), (g, 2t+8..),
    (g+8, 2t+8..), low half first (PTX ISA). That is one Philox group, word by word."""
    seed = torch.tensor([11, 13])
    zeros = torch.zeros(1, dtype=torch.int64)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        words = dropout._philox(zeros + t, zeros + g, seed[1], seed[0])
        fragment = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
        for register, (row, col) in enumerate(fragment):
            for half in (0, 1):
                bits = words[register].item() >> 16 * half & 0x3FFF
                for threshold in (bits, bits + 1):
                    mask = dropout.reference_mask(seed, 16, 16, threshold)
                    assert mask[row, col + half].item() == (bits >= threshold)


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_implementation_draws_the_same_bits(mask_module, window, seed):
    for threshold in (0, 1, 1638, 8192, 16383, 16384):
        expected = dropout.reference_mask(torch.tensor(seed), *window, threshold)
        op = torch.ops.lora_kernels.dropout_mask(torch.tensor(seed), *window, threshold)
        assert op.dtype == torch.bool and torch.equal(op, expected), "C++"
        for blocks in (1, 3):
            cuda = mask_module.dropout_mask(seed, *window, threshold, blocks)
            assert np.array_equal(cuda, expected.to(torch.uint8).numpy()), "CUDA source on the host"


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_cuda_draws_the_same_bits(window, seed):
    expected = dropout.reference_mask(torch.tensor(seed), *window, 1638)
    got = torch.ops.lora_kernels.dropout_mask(torch.tensor(seed, device="cuda"), *window, 1638)
    assert torch.equal(got.cpu(), expected)


def test_threads_do_not_change_the_mask_or_any_result():
    import problems

    problem = problems.make((300, 200, 400, 16), torch.float32, dropout_p=0.2)
    seen = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            mask = lk.dropout_mask([1, 2], (300, 400), 0.2)
            h = torch.ops.lora_kernels.down_proj(problem.x, problem.lora_a, problem.seed, 3277, 1.0)
            grad = torch.ops.lora_kernels.weight_grad(
                h, problem.x, problem.seed, 3277, 1.0, False, False
            )
            seen.append((mask, h, grad))
        finally:
            torch.set_num_threads(1)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_statistics(p):
    """Mean within 5 standard errors of q; rows, columns and neighbours uncorrelated."""
    rows, cols = 1000, 1024
    mask = lk.dropout_mask([3, 1], (rows, cols), p).double()
    q = lk.keep_probability(p)
    sigma = math.sqrt(q * (1 - q))
    assert abs(mask.mean().item() - q) < 5 * sigma / math.sqrt(rows * cols)
    centred = (mask - q) / sigma
    for dr, dc in ((0, 1), (1, 0), (8, 0), (0, 8), (8, 8), (16, 16)):
        product = centred[: rows - dr, : cols - dc] * centred[dr:, dc:]
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())
    other = lk.dropout_mask([3, 2], (rows, cols), p).double()
    assert abs((centred * (other - q) / sigma).mean().item()) < 5 / math.sqrt(rows * cols)


def test_keep_probability_is_what_the_mask_has():
    """q over all 16384 patterns: the threshold's own count, and p's nearest multiple of 2^-14."""
    for p in (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.999, 1.0):
        q = lk.keep_probability(p)
        assert q == 1 - dropout.drop_threshold(p) / 16384 and abs(q - (1 - p)) <= 2**-15


def test_p_that_quantises_to_nothing_and_to_everything():
    assert lk.keep_probability(2**-16) == 1 and lk.keep_probability(1 - 2**-16) == 0
    assert lk.dropout_mask([1, 2], (64, 64), 2**-16).all()
    assert not lk.dropout_mask([1, 2], (64, 64), 1.0).any()


def test_leading_dimensions_count_as_rows():
    flat = lk.dropout_mask([1, 2], (24, 40), 0.3)
    assert torch.equal(lk.dropout_mask([1, 2], (2, 3, 4, 40), 0.3).view(24, 40), flat)


def test_seed_forms():
    flat = lk.dropout_mask([1, 2], (24, 40), 0.3)
    assert torch.equal(lk.dropout_mask(torch.tensor([1, 2]), (24, 40), 0.3), flat)
    strided = torch.tensor([1, 0, 2, 0])[::2]
    assert torch.equal(lk.dropout_mask(strided, (24, 40), 0.3), flat)
    with pytest.raises(ValueError, match=r"seed must be an int64 tensor \[2\]"):
        lk.dropout_mask([1, 2, 3], (4, 4), 0.3)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1.5"):
        lk.dropout_mask([1, 2], (4, 4), 1.5)


def call(p=0.3, **kwargs):
    g = torch.Generator().manual_seed(0)
    x, w, a, b = (torch.randn(*s, generator=g) for s in ((9, 20), (12, 20), (4, 20), (12, 4)))
    return lk.fused_lora_linear(x, w, a, b, dropout_p=p, **kwargs)


def test_drawn_seed_follows_the_default_generator(backend):
    torch.manual_seed(3)
    first, second = call(backend=backend), call(backend=backend)
    torch.manual_seed(3)
    assert torch.equal(call(backend=backend), first) and not torch.equal(first, second)


def test_a_drawn_seed_uses_every_bit():
    """63 of seed and offset each; a bit that 64 draws leave alone is not drawn."""
    drawn = [dropout.draw_seed(torch.device("cpu")).tolist() for _ in range(64)]
    for words in zip(*drawn, strict=True):
        assert functools.reduce(int.__or__, words) == 2**63 - 1
        assert functools.reduce(int.__and__, words) == 0


@pytest.mark.parametrize("p", [0.0, 2**-16, 2**-15])
def test_no_dropout_draws_nothing(backend, p):
    state = torch.get_rng_state()
    call(p=p, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


def test_strided_seed(backend):
    seed = torch.tensor([1, 9, 2, 9])[::2]
    assert torch.equal(
        call(seed=seed, backend=backend), call(seed=torch.tensor([1, 2]), backend=backend)
    )


def test_seed_with_p_zero_changes_nothing(backend):
    assert torch.equal(
        call(p=0.0, seed=torch.tensor([1, 2]), backend=backend), call(p=0.0, backend=backend)
    )


def test_a_default_device_does_not_move_the_mask():
    want = lk.dropout_mask([1, 2], (5, 8), 0.5)
    with torch.device("meta"):
        assert torch.equal(lk.dropout_mask([1, 2], (5, 8), 0.5), want)

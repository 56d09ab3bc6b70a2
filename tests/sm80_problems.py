"""The problems that planted bugs of fused_gemm_sm80 have to fail, as in mutation_problems.py."""

from __future__ import annotations

import json

import numpy as np
import torch
from emulator.suite import bf16
from group_problems import backward_group_problem, forward_group_problem
from mutation_problems import ALIGNED, UNALIGNED, exact, ternary

from lora_kernels import dropout

# (M, N, K, r), options, and what else is odd about it: how y lies, a bias, a row of h that is
# infinite. Together: every tile, K-major and MN-major weights, tails of all four sizes, fewer and
# more stages than a ring has, several groups of rows, masks of ranks in a stage and past the ring,
# scales within and beside the sums, no depth and no rank, copies, offsets past 2^31.
FUSED_GEMM = [
    ((200, 300, 200, 24), dict(tile_n=128, scale=4), dict(bias="strided", y="odd")),
    ((140, 264, 168, 40), dict(tile_n=256), dict(mn_major=True)),
    ((200, 135, 232, 72), dict(tile_n=64, group=3, scale=2), dict(bias="rows", y="gaps")),
    ((70, 264, 72, 200), dict(tile_n=64, group=1, seed=UNALIGNED, scale=3), dict(bias="rows")),
    ((140, 136, 328, 136), dict(tile_n=128, seed=ALIGNED, scale=2), dict(infinite=True)),
    ((150, 264, 40, 24), dict(tile_n=256, seed=ALIGNED), dict(infinite=True)),
    ((70, 72, 0, 24), dict(tile_n=64, seed=UNALIGNED), dict(bias="rows")),
    ((70, 136, 72, 8), dict(tile_n=128, scale=2), dict(mn_major=True)),
    ((20, 72, 24, 0), dict(tile_n=64), {}),
    ((50, 75, 67, 7), dict(tile_n=64), dict(bias="rows")),
    ((66, 8, 40, 8), dict(tile_n=64), dict(y="far")),
]
THRESHOLD = 4000


def fused_gemm_problem(shape, options, odd) -> dict[str, np.ndarray]:
    m, n, k, r = shape
    g = np.random.default_rng(m + n + k + r)
    x, weight = ternary(g, m, k, keep=min(k // 2, 40)), ternary(g, n, k, keep=min(k // 2, 40))
    h, up = ternary(g, m, r, keep=min(r, 30)) * 1.0, ternary(g, n, r, keep=min(r, 8))
    if odd.get("infinite"):
        h[m - 1, r - 1] = np.inf
    options = dict(scale=1) | options
    with np.errstate(invalid="ignore"):
        term = options["scale"] * h @ up.T
    if "seed" in options:
        kept = dropout.reference_mask(torch.tensor(options["seed"]), m, n, THRESHOLD).numpy()
        term, options["threshold"] = np.where(kept, term, 0), THRESHOLD
    bias = g.integers(-8, 9, n) if "bias" in odd else np.zeros(0)
    y = x @ weight.T + term + (bias if len(bias) else 0)
    columns, rows = -(-n // options["tile_n"]), -(-m // (64 if options["tile_n"] == 64 else 128))
    copied = k % 8 != 0 or r % 8 != 0
    # x and h for every column of tiles, weight and up for every row; nothing known of copies
    read = 0 if copied or len(bias) else 2 * (k + r) * (columns * m + rows * n)
    options = options | dict(scale=(0, options["scale"]), compute=80)
    arrays = dict(x=x, weight=weight, h=h, up=up, bias=bias)
    return {name: bf16(array) for name, array in arrays.items()} | dict(
        y=exact(y), options=np.array(json.dumps(options)), bytes=np.array(read),
        mn_major=np.array(odd.get("mn_major", "seed" in options)),
        strided_bias=np.array(odd.get("bias") == "strided"), place=np.array(odd.get("y", "rows")),
    )  # fmt: skip


# As those of group_problems.py. Outputs: several tiles of each, of one without rank, one that is
# copied, and one that decides how all lie.
GROUP = dict(compute=80)
OUTPUTS = [
    (
        (140, 72),
        [
            (136, 16, dict(seed=[5, 6], threshold=4000, bias=True)),
            (40, 7, dict(scale=(2.0, 4.0))),
            (200, 0, dict(bias=True)),
        ],
        dict(GROUP, turns=1),
        ["pack", *["down_proj_sm80"] * 2, "fused_gemm_sm80", "pack"],
    ),
    (
        (70, 136),
        [
            (40, 8, dict(scale=(2.0, 4.0), bias=True)),
            (200, 40, dict(scale=(2.0, 2.0))),
        ],
        dict(GROUP, transposed=["weight1"], turns=1),
        ["pack", *["down_proj_sm80"] * 2, "fused_gemm_sm80"],
    ),
]
# Sums: scales in the sums of products before, a mask of each, one without, one without rank.
SUMS = [
    (
        (140, 72),
        [
            (72, 16, dict(scale=(1.0, 4.0), wanted=[])),
            (40, 8, dict(scale=(1.0, 2.0), wanted=[])),
            (24, 0, dict(wanted=[])),
        ],
        dict(GROUP, turns=2),
        [*["down_proj_sm80"] * 2, "fused_gemm_sm80"],
    ),
    (
        (70, 136),
        [
            (40, 16, dict(seed=[5, 6], threshold=4000, wanted=[])),
            (72, 40, dict(seed=[5, 7], threshold=9000, scale=(1.0, 4.0), wanted=[])),
            (264, 8, dict(scale=(1.0, 2.0), wanted=[])),
        ],
        dict(GROUP, turns=2),
        [*["down_proj_sm80"] * 3, "fused_gemm_sm80"],
    ),
]


def all_problems() -> dict[str, dict[str, np.ndarray]]:
    found = {f"gemm80-{i}": fused_gemm_problem(*case) for i, case in enumerate(FUSED_GEMM)}
    found |= {f"outputs80-{i}": forward_group_problem(*case) for i, case in enumerate(OUTPUTS)}
    return found | {f"sums80-{i}": backward_group_problem(*case) for i, case in enumerate(SUMS)}

"""The problems of the decode kernel: small integers whose results are exact, and its traffic.

Kind `decode` of emulator/suite.py, for planted bugs and for test_decode.py.
"""

from __future__ import annotations

import json

import numpy as np
from emulator.suite import bf16
from mutation_problems import ALIGNED, UNALIGNED, exact, masked, ternary

# (M, N, K, r), rows and columns of a tile, parts of K, and what else: together every tile, both
# fragments' edges of M, ragged N and K, ranks with and without a tail, parts of unequal length and
# without any depth, rings that wrap and rings that never fill, masks that straddle and that do not.
DECODE = {
    "one_row": ((1, 40, 200, 16), (64, 48, 1), {}),
    "two_rows_two_parts": ((2, 136, 328, 8), (64, 48, 2), dict(seed=ALIGNED)),
    "rank_past_a_unit": ((7, 100, 600, 17), (192, 112, 4), dict(seed=UNALIGNED)),
    "any_layout": ((8, 33, 67, 1), (64, 16, 1), dict(odd=True)),
    "no_rank": ((15, 200, 72, 0), (64, 64, 2), {}),
    "eight_parts": ((16, 72, 1160, 64), (192, 48, 8), dict(seed=ALIGNED, bias=False)),
    "rank_128": ((17, 130, 136, 128), (192, 64, 1), dict(seed=UNALIGNED, turns=2)),
    "four_parts": ((33, 72, 264, 16), (64, 32, 4), dict(seed=ALIGNED, odd=True, turns=3)),
    "widest_tile": ((64, 200, 520, 24), (192, 160, 2), dict(turns=2)),
    "parts_without_depth": ((64, 40, 712, 8), (64, 48, 8), dict(turns=2)),
    "ring_wraps": ((20, 40, 1160, 16), (64, 48, 1), dict(scale=(2.0, 0.5), turns=3)),
    "term_left_out": ((9, 40, 136, 16), (64, 48, 1), dict(scale=(2.0, 0.0))),
    "no_depth": ((3, 40, 0, 8), (64, 48, 2), {}),
    "no_columns": ((8, 0, 72, 16), (64, 16, 2), dict(bias=False)),
}


def decode_problem(shape, tile, more) -> dict[str, np.ndarray]:
    m, n, k, r = shape
    rows, tile_n, splits = tile
    g = np.random.default_rng(m + n + k + r)
    x, weight = ternary(g, m, k, keep=k // 2), ternary(g, n, k, keep=min(k // 2, 60))
    a = ternary(g, r, k, keep=k // 4) if r else np.zeros((0, k))
    b = ternary(g, n, r, keep=4) if r else np.zeros((n, 0))
    kept, threshold = np.ones((m, k), bool), 0
    if "seed" in more:
        kept, threshold = masked(more["seed"], x, a)
    h_scale, up_scale = more.get("scale", (2.0, 1.0))
    h = h_scale * (np.where(kept, x, 0) @ a.T)
    bias = g.integers(-8, 9, n) if more.get("bias", True) else np.zeros(0)
    y = x @ weight.T + up_scale * h @ b.T + (bias if len(bias) else 0)
    tiles = max(1, -(-n // tile_n))
    # W once; A and x for every tile; B and the bias for every part of each
    read = 2 * (n * k + tiles * (r + m) * k + splits * (n * r + len(bias)))
    options = dict(form="decode", rows=rows, decode_n=tile_n, splits=splits, threshold=threshold)
    options |= {"scale": (h_scale, up_scale)} | {k: v for k, v in more.items() if k == "seed"}
    arrays = dict(x=x, weight=weight, a=a, b=b, bias=bias)
    return {name: bf16(array) for name, array in arrays.items()} | dict(
        y=exact(y), h=exact(h), options=np.array(json.dumps(options)), bytes=np.array(read),
        odd=np.array(more.get("odd", False)), turns=np.array(more.get("turns", 4)),
    )  # fmt: skip


def all_problems() -> dict[str, dict[str, np.ndarray]]:
    return {f"decode-{name}": decode_problem(*case) for name, case in DECODE.items()}

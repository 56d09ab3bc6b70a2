"""The problems that planted bugs have to fail, small integers whose results are exact.

Kinds of emulator/suite.py; what each is for stands at its list.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from emulator.suite import bf16

from lora_kernels import dropout

# kind, (M, K, r), `down` has its rank contiguous, seed, rows padded; few multiprocessors take tall
# tiles, many low ones; True: the rows of x lie so far apart that offsets pass 2^31
FEW, MANY = 1, 100
WIDE_SEED = [(1 << 40) + 7, (1 << 41) + 5]
DOWN_PROJ = [
    ("sm90", (200, 1160, 16), False, [], False, FEW),
    ("sm90", (130, 4616, 24), False, WIDE_SEED, False, FEW),
    ("sm90", (170, 584, 136), True, [], False, FEW),
    ("sm90", (200, 328, 200), False, [5, 6, 16, 32], True, FEW),
    ("sm90", (130, 136, 16), False, [5, 6, 16, 8], False, FEW),
    ("sm90", (200, 72, 300), False, [], False, FEW),
    ("sm90", (200, 72, 304), True, [], False, FEW),
    ("sm90", (1, 70, 8), False, [], True, FEW),
    ("sm80", (200, 4616, 24), False, WIDE_SEED, False, FEW),
    ("sm80", (33, 2000, 13), False, [5, 6, 16, 32], True, MANY),
    ("sm80", (50, 333, 7), False, [5, 6, 3, 21], False, MANY),
    ("sm80", (64, 136, 16), False, [5, 6, 16, 3], False, MANY),
    ("sm80", (64, 136, 16), False, [5, 6, 8, 16], False, MANY),
    ("sm80", (64, 136, 16), False, [5, 6, 1 << 32, (1 << 33) + 48], False, MANY),
    ("sm80", (40, 136, 100), True, [], False, MANY),
    ("sm80", (90, 328, 100), True, [], False, FEW),
    ("sm80", (70, 200, 300), False, [], False, FEW),
    ("sm80", (20, 72, 100), False, [], False, MANY),
    ("sm80", (70, 200, 24), False, [], False, FEW, True),
]
# (M, K), ranks, seeds, parts. Together: several projections in a tile, in several tiles, slices of
# one, a mask each.
GROUPS = [
    ((130, 328), (8, 3, 9), [], 1),
    ((70, 1160), (120, 40, 100, 9), [], 2),
    ((70, 72), (24, 300, 5, 8), [], 7),
    ((130, 136), (16, 7, 16), [[5, 6], [6, 6, 16, 32], [7, 6, 3, 21]], 3),
    ((70, 72), (300, 24), [[5, 6], [5, 7]], 3),
]


def ternary(generator: np.random.Generator, *shape: int, keep: int) -> np.ndarray:
    """-1, 0, 1 with about `keep` non-zeros a row: every sum is an integer that bf16 holds."""
    values = generator.integers(-1, 2, shape)
    return values * (generator.random(shape) < keep / max(shape[-1], 1))


def masked(seed: list[int], x: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, int]:
    """A mask and its threshold, at which some elements that decide h just survive."""
    for threshold in range(4000, 4200):
        kept, fewer = (
            dropout.reference_mask(torch.tensor(seed), *x.shape, t).numpy()
            for t in (threshold, threshold + 1)
        )
        if np.any((x * (kept != fewer)) @ down.T):
            return kept, threshold
    raise AssertionError("no threshold decides about h")


def down_proj_problem(
    shape, mn_major, seed, padded, multiprocessors, far=False
) -> dict[str, np.ndarray]:
    m, k, r = shape
    g = np.random.default_rng(m + k + r)
    x, down = ternary(g, m, k, keep=min(k // 2, 500)), ternary(g, r, k, keep=40)
    kept, threshold = np.ones((m, k), bool), 0
    if seed:
        kept, threshold = masked(seed, x, down)
    h = 2 * (np.where(kept, x, 0) @ down.T)
    assert np.abs(h).max() < 256
    return dict(
        x=bf16(x), down=bf16(down), h=bf16(h), mn_major=np.array(mn_major),
        seed=np.array(seed, np.int64), padded=np.array(padded), threshold=np.array(threshold),
        multiprocessors=np.array(multiprocessors), far=np.array(far),
    )  # fmt: skip


def group_problem(shape, ranks, seeds, parts) -> dict[str, np.ndarray]:
    m, k = shape
    g = np.random.default_rng(m + k + sum(ranks))
    x, *downs = (ternary(g, n, k, keep=40) for n in (m, *ranks))
    kept, threshold = [np.ones((m, k), bool)] * len(ranks), 0
    if seeds:
        _, threshold = masked(seeds[0], x, downs[0])
        kept = [dropout.reference_mask(torch.tensor(s), m, k, threshold).numpy() for s in seeds]
    options = dict(
        count=len(ranks), seeds=seeds or [[] for _ in ranks], threshold=threshold,
        scales=[2.0 * (1 + i) for i in range(len(ranks))],
    )  # fmt: skip
    found = {"x": bf16(x), "options": np.array(json.dumps(options))}
    found["bytes"] = np.array(2 * k * (parts * m + -(-m // 64) * sum(ranks)))
    for i, down in enumerate(downs):
        found |= {f"down{i}": bf16(down), f"h{i}": exact(2 * (1 + i) * (x * kept[i]) @ down.T)}
    return found


# (M, N, K, r), options, and what else is odd about it. Together: every tile, a ring that wraps,
# both blocks of a pair with and without rows, several groups and grids, chains first or not, all
# layouts and ways to store.
PINNED = dict(tile_n=128, group=2)
FORWARD = [
    ((600, 136, 72, 24), dict(PINNED, form="one_launch", chain=2, multiprocessors=12), {}),
    ((140, 200, 456, 72), dict(PINNED, form="one_launch", tile_n=192, seed=[5, 6, 16, 32]), {}),
    ((140, 72, 136, 24), dict(PINNED, form="one_launch", seed=[5, 6, 16, 32]), {}),
    ((600, 72, 72, 8), dict(PINNED, form="one_launch", chain=2, seed=[5, 6, 3, 21]), {}),
    ((140, 328, 72, 16), dict(PINNED, form="two_launches", tile_n=256, multiprocessors=2), {}),
    (
        (300, 200, 136, 40),
        dict(PINNED, form="two_launches", scale=(2.0, 4.0)),
        {"mn_major": True},
    ),
    ((150, 131, 67, 7), dict(PINNED, form="one_launch", multiprocessors=2), {"strided_bias": True}),
    ((50, 131, 67, 7), dict(PINNED, form="two_launches", multiprocessors=2), {"bias": False}),
    ((100, 136, 200, 0), dict(PINNED), {}),
    ((20, 264, 72, 16), dict(PINNED, form="two_launches", tile_n=256), {"mn_major": True}),
    ((20, 24, 1333, 7), dict(PINNED, form="one_launch", multiprocessors=2), {}),
    ((1, 76, 72, 8), dict(PINNED, form="two_launches"), {}),
]


def forward_problem(shape, options, odd) -> dict[str, np.ndarray]:
    m, n, k, r = shape
    g = np.random.default_rng(m + n + k + r)
    x, weight = ternary(g, m, k, keep=min(k // 2, 60)), ternary(g, n, k, keep=min(k // 2, 60))
    a, b = ternary(g, r, k, keep=8) if r else np.zeros((0, k)), np.zeros((n, 0))
    if r:
        b = ternary(g, n, r, keep=4)
    kept, threshold = np.ones((m, k), bool), 0
    if "seed" in options:
        kept, threshold = masked(options["seed"], x, a)
    h = 2 * (np.where(kept, x, 0) @ a.T)
    bias = g.integers(-8, 9, n) if odd.get("bias", True) else np.zeros(0)
    y = x @ weight.T + options.get("scale", (2, 1))[1] * h @ b.T + (bias if len(bias) else 0)
    assert max(np.abs(h).max(initial=0), np.abs(y).max()) < 256
    pairs, columns = -(-m // 256), -(-n // options["tile_n"])
    read = 0
    if options.get("form") == "one_launch" and not odd and k % 8 == 0:
        # x for every column of tiles and for h; W and B for every pair of row blocks; A for each h;
        # bias for every warpgroup
        read = 2 * ((columns + 1) * m * k + columns * m * r + pairs * (n * (k + r + 4) + r * k))
    options = options | dict(threshold=threshold)
    arrays = dict(x=x, weight=weight, a=a, b=b, bias=bias, y=y, h=h)
    return {name: bf16(array) for name, array in arrays.items()} | dict(
        options=np.array(json.dumps(options)), mn_major=np.array(odd.get("mn_major", False)),
        strided_bias=np.array(odd.get("strided_bias", False)), bytes=np.array(read),
    )  # fmt: skip


# (M, N, K, r), options, and what else is odd about it. Together: chunks of 512, 256 and 128 rows,
# two blocks of ranks, splits of both passes, rings that wrap, masks of two rank stages, aligned and
# not, fp32 gradients, every subset, copies, no depth; in one grid both tiles, several groups,
# chunks, slices and waves, more clusters than chunks, tiles of 16 ranks and of 64.
GRID = dict(form="one_grid", tile_n=128)
ALIGNED, UNALIGNED = [5, 6, 16, 32], [5, 6, 3, 21]
BACKWARD = [
    ((560, 136, 280, 16), dict(form="passes", multiprocessors=4, seed=ALIGNED), {"bias": True}),
    ((300, 136, 136, 100), dict(form="passes", multiprocessors=2, seed=UNALIGNED), {"wide": True}),
    ((140, 264, 72, 300), dict(form="passes", multiprocessors=2, turns=2), {"bias": True}),
    (
        (70, 75, 90, 23),
        dict(form="passes", subsets=[["dx"], ["da"], ["db"], ["dx", "dbias"]], seed=ALIGNED),
        {"bias": True},
    ),
    ((100, 0, 72, 8), dict(form="passes", seed=ALIGNED, turns=1), {}),
    ((70, 75, 72, 8), dict(form="passes", subsets=[["dx", "db"]], turns=1), {}),
    ((1100, 72, 584, 12), dict(GRID, group=2, multiprocessors=12, turns=2), {}),
    ((1100, 72, 72, 24), dict(GRID, group=2, multiprocessors=12), {}),
    ((600, 136, 136, 40), dict(GRID, group=2, multiprocessors=4, seed=ALIGNED, limited=True), {}),
    (
        (150, 75, 250, 7),
        dict(GRID, tile_n=256, multiprocessors=2, seed=UNALIGNED, calls=2, turns=2),
        {"wide": True},
    ),
    ((150, 75, 250, 20), dict(GRID, multiprocessors=2, turns=2), {}),
]


def backward_problem(shape, options, odd) -> dict[str, np.ndarray]:
    """Integers, but for an infinity in x and in A where the mask drops it."""
    m, n, k, r = shape
    g = np.random.default_rng(m + n + k + r)
    dy, x = ternary(g, m, n, keep=min(n // 4, 40)), ternary(g, m, k, keep=k // 4)
    weight, a = ternary(g, n, k, keep=k // 4), ternary(g, r, k, keep=k // 8)
    b, h = ternary(g, n, r, keep=min(r // 4 + 1, 8)), ternary(g, m, r, keep=r // 2 + 1)
    options = dict(calls=1, limited=False, scale=(2.0, 2.0)) | options
    h_scale, up = options["scale"]
    masked_scale, kept = up, np.ones((m, k), bool)
    dh = h_scale * dy @ b
    dropped = x
    if "seed" in options:
        kept, options["threshold"] = masked(options["seed"], x, a)
        masked_scale = options["masked_scale"] = 2 * up
        dropped = np.where(kept, x, 0)
        x = np.where(kept | (g.random((m, k)) < 0.99), x, np.inf)
        a = np.where(g.random((r, k)) < 0.999, a, np.inf)
    with np.errstate(invalid="ignore"):
        lora = np.where(kept, masked_scale * (dh @ a), 0)
    found = dict(dx=dy @ weight + lora, da=masked_scale * dh.T @ dropped, db=up * dy.T @ h)
    if odd.get("bias"):
        found["dbias"] = dy.sum(0)
    for name, array in found.items():
        wide = odd.get("wide") and name in ("da", "db")
        found[name] = array.astype(np.float32) if wide else exact(array)
    assert np.array_equal(value_of(exact(dh)), dh)
    operands = dict(dy=dy, x=x, weight=weight, a=a, b=b, h=h)
    return {name: bf16(array) for name, array in operands.items()} | found | {
        "options": np.array(json.dumps(options))
    }  # fmt: skip


# (M, K), ranks and seeds of the parts, multiprocessors, splits of K. Together: every tile, one
# block of ranks and two, a part without dropout, no dropout at all, rings that wrap.
PARTS = [
    ((600, 200), (16, 3, 40), [[5, 6], [], [5, 7]], 1, 1),
    ((300, 136), (72, 7, 16), [[], [5, 6, 3, 21], [7, 6, 3, 21]], 4, 2),
    ((140, 72), (200, 40, 24, 16), [[5, 6 + p, 16, 32] for p in range(4)], 1, 1),
    ((140, 136), (200, 60), [[], []], 1, 1),
]


def parts_problem(shape, ranks, seeds, multiprocessors, splits) -> dict[str, np.ndarray]:
    """Integers; what lies in h between the parts is NaN."""
    m, k = shape
    g = np.random.default_rng(m + k)
    x = ternary(g, m, k, keep=k // 4)
    widths = [-(-r // 8) * 8 for r in ranks]
    h = np.full((m, sum(widths)), 0x7FC0, np.uint16)
    found, parts, spans = {}, [], []
    for p, (r, seed) in enumerate(zip(ranks, seeds, strict=True)):
        own, kept, threshold = ternary(g, m, r, keep=r // 2 + 1), True, 0
        if seed:
            kept, threshold = masked(seed, x, np.ones((1, k)))
        grad = 2.0**p * own.T @ np.where(kept, x, 0)
        found[f"grad{p}"] = exact(grad) if p % 2 else grad.astype(np.float32)
        first = sum(widths[:p])
        spans.append((first, first + r))
        h[:, first : first + r] = bf16(own)
        parts.append(dict(first=first, scale=2.0**p, seed=seed, threshold=threshold))
    tile = next(t for t in (64, 128, 256) if t >= h.shape[1] or t == 256)
    turns = [
        sum(first < start + tile and last > start for first, last in spans) if any(seeds) else 1
        for start in range(0, h.shape[1], tile)
    ]
    # x for each turn, h for each split; partial results of every chunk in fours of columns
    read = 2 * m * (k * sum(turns) + h.shape[1] * splits)
    read += 4 * -(-m * tile // (64 * 512)) * k * sum(-(-r // 4) * 4 for r in ranks)
    options = dict(parts=parts, bytes=read, multiprocessors=multiprocessors)
    return found | dict(x=bf16(x), h=h, options=np.array(json.dumps(options)))


# (M, K), ranks and seeds of the parts, multiprocessors, and what else is odd about it. Together:
# every tile of the sm_80 kernel, rings that wrap, chunks, blocks of ranks, sums, element loads.
GRAD80 = [
    ((420, 200), (8, 5), [[5, 6], [5, 7, 16, 32]], 1, {}),
    ((420, 136), (13,), [[]], 4, {"sums": True}),
    ((300, 72), (72, 7, 16), [[], [5, 6, 3, 21], [7, 6, 3, 21]], 4, {}),
    ((140, 40), (200, 60), [[], []], 1, {"sums": True}),
    ((150, 67), (7,), [[5, 6, 3, 21]], 2, {"transposed": True}),
    ((140, 72), (200, 40), [[5, 6, 16, 32], [5, 7, 16, 32]], 1, {}),
    ((300, 136), (40,), [[]], 1, {}),
]


def grad80_problem(shape, ranks, seeds, multiprocessors, odd) -> dict[str, np.ndarray]:
    """As parts_problem; where all drop x it is infinite."""
    m, k = shape
    found = parts_problem(shape, ranks, seeds, multiprocessors, 1)
    options = json.loads(str(found["options"]))
    pitch, strips, widest = found["h"].shape[1], -(-k // 128), max(ranks)
    if odd.get("sums"):
        found["sums"] = exact(value_of(found["x"]).sum(0, keepdims=True))
    if not any(seeds):
        widest, ranks = pitch, (pitch,)
    if all(seeds):
        drops = [
            ~dropout.reference_mask(torch.tensor(p["seed"]), m, k, p["threshold"]).numpy()
            for p in options["parts"]
        ]
        found["x"][np.all(drops, 0)] = 0x7F80
    tile = next(t for t in (16, 64, 128) if t >= widest or t == 128)
    blocks = sum(-(-r // tile) for r in ranks)
    floats = pitch + (4 if odd.get("sums") else 0)
    most = min(2 * multiprocessors // (strips * blocks), m // (8 * floats))
    rows = -(-m // max(1, most) // 64) * 64
    # x for each block of ranks, h for each strip, partial results in fours
    own = [p[-1].shape[0] for p in sorted(found.items()) if p[0].startswith("grad")]
    read = 2 * m * (k * blocks + sum(ranks) * strips)
    read += 4 * -(-m // rows) * k * (sum(-(-r // 4) * 4 for r in own) + floats - pitch)
    options |= dict(bytes=read, compute=80)
    odd = np.array(odd.get("transposed", False))
    return found | dict(options=np.array(json.dumps(options)), transposed=odd)


def value_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def exact(values: np.ndarray) -> np.ndarray:
    """bf16 that rounds nothing, NaN as the emulator writes it."""
    bits = bf16(values)
    assert np.array_equal(value_of(bits), values.astype(np.float32), equal_nan=True)
    return np.where(np.isnan(values), 0x7FFF, bits).astype(np.uint16)


def gemm_problem(trans_a: bool, trans_b: bool) -> dict[str, np.ndarray]:
    g = np.random.default_rng(9)
    a, b = ternary(g, 328, 456, keep=60), ternary(g, 200, 456, keep=60)
    operands = {
        "a": np.ascontiguousarray(bf16(a.T if trans_a else a)),
        "b": np.ascontiguousarray(bf16(b.T if trans_b else b)),
    }
    return operands | dict(c=bf16(a @ b.T), trans_a=np.array(trans_a), trans_b=np.array(trans_b))


def all_problems() -> dict[str, dict[str, np.ndarray]]:
    """Each is named by its kind and a number."""
    found = {f"{c[0]}-{i}": down_proj_problem(*c[1:]) for i, c in enumerate(DOWN_PROJ)}
    found |= {f"group-{i}": group_problem(*c) for i, c in enumerate(GROUPS)}
    found |= {f"forward-{i}": forward_problem(*c) for i, c in enumerate(FORWARD)}
    for i, case in enumerate(BACKWARD):
        kind = "grid" if case[1]["form"] == "one_grid" else "passes"
        found[f"{kind}-{i}"] = backward_problem(*case)
    found |= {f"parts-{i}": parts_problem(*c) for i, c in enumerate(PARTS)}
    found |= {f"grad80-{i}": grad80_problem(*c) for i, c in enumerate(GRAD80)}
    found |= {f"gemm-{a}{b}": gemm_problem(a, b) for a, b in [(False, False), (True, True)]}
    source = np.random.default_rng(3).integers(0, 1 << 15, (64 * 5, 64)).astype(np.uint16)
    return found | {"relay": {"in": source}}

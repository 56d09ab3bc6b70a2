"""What benchmarks leave, made up, for the tests of the suite and of what is published."""

from __future__ import annotations


def gemm_group(rank: int, **over: float) -> dict:
    """A table of bench_gemm: `over` are times over the plain GEMM's, which is 1.1 of vendor's."""
    shape = {"label": "8x8", "m": 8, "n": 8, "k": 8, "rank": rank, "dtype": "bf16", "dropout": 0.1}
    rows = [{"name": "vendor", "over_plain": 1 / 1.1, "over_vendor": 1.0}]
    for name, ratio in {"plain": 1.0, **over}.items():
        rows.append({"name": name, "plan": "tile", "over_plain": ratio, "over_vendor": 1.1 * ratio})
    rows.append({"name": "addmm", "over_plain": 9.0, "over_vendor": 9.9})
    return shape | {"left_out": {}, "rows": rows}


def group_table(p: float, **more) -> dict:
    """A table of bench_group: separate calls 1.2 of frozen, the group 1.1."""
    over = {"frozen": 1.0, "eager": 1.5, "cuda apart": 1.2, "cuda group": 1.1}
    rows = [
        {"name": name, "over_frozen": ratio, "of_apart": 1.1 / 1.2 if "group" in name else None}
        for name, ratio in over.items()
    ]
    about = {"label": "model q, k, v", "rank": 16, "dtype": "bf16", "dropout": p, "mode": "forward"}
    return about | {"rows": rows} | more

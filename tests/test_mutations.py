"""Each planted bug of mutants.py turns the suite red; unchanged sources leave it green."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mutants
import mutants_forward
import numpy as np
import pytest
import torch
from emulator import build
from emulator.suite import bf16
from mutants import Mutant

from lora_kernels import dropout

KILLED = mutants.KILLED + mutants_forward.KILLED
SURVIVORS = mutants.SURVIVORS + mutants_forward.SURVIVORS
UNUSED_TILES = ("X(16, 64, 4, 2, 64, 6)", "X(64, 64, 4, 2, 64, 4)", "X(64, 12)", "X(128, 8)")
TIMEOUT = 60  # seconds; a run of the whole suite takes a few
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


def ternary(generator: np.random.Generator, *shape: int, keep: int) -> np.ndarray:
    """-1, 0, 1 with about `keep` non-zeros a row: every sum is an integer that bf16 holds."""
    values = generator.integers(-1, 2, shape)
    return values * (generator.random(shape) < keep / shape[-1])


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


# (M, N, K, r), options, and what else is odd about it. Together: every tile, a ring that wraps,
# both blocks of a pair with and without rows, several groups and grids, chains first or not, all
# layouts and ways to store.
PINNED = dict(tile_n=128, group=2)
FORWARD = [
    ((600, 136, 72, 24), dict(PINNED, form="one_launch", chain=2, multiprocessors=12), {}),
    ((140, 200, 456, 72), dict(PINNED, form="one_launch", tile_n=192, seed=[5, 6, 16, 32]), {}),
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
    ((20, 24, 333, 7), dict(PINNED, form="one_launch", multiprocessors=2), {}),
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


def gemm_problem(trans_a: bool, trans_b: bool) -> dict[str, np.ndarray]:
    g = np.random.default_rng(9)
    a, b = ternary(g, 328, 456, keep=60), ternary(g, 200, 456, keep=60)
    operands = {
        "a": np.ascontiguousarray(bf16(a.T if trans_a else a)),
        "b": np.ascontiguousarray(bf16(b.T if trans_b else b)),
    }
    return operands | dict(c=bf16(a @ b.T), trans_a=np.array(trans_a), trans_b=np.array(trans_b))


@pytest.fixture(scope="session")
def problems(tmp_path_factory) -> Path:
    found = {f"{c[0]}-{i}": down_proj_problem(*c[1:]) for i, c in enumerate(DOWN_PROJ)}
    found |= {f"forward-{i}": forward_problem(*c) for i, c in enumerate(FORWARD)}
    found |= {f"gemm-{a}{b}": gemm_problem(a, b) for a, b in [(False, False), (True, True)]}
    source = np.random.default_rng(3).integers(0, 1 << 15, (64 * 5, 64)).astype(np.uint16)
    found["relay"] = {"in": source}
    arrays = {f"{name}/{key}": v for name, p in found.items() for key, v in p.items()}
    path = tmp_path_factory.mktemp("mutations") / "problems.npz"
    np.savez(path, **arrays)
    return path


def run_suite(library: Path, problems: Path, *kinds: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "emulator.suite", str(library), str(problems), *kinds]
    folder = build.EMULATOR.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=folder)


def plant(mutant: Mutant, tree: Path) -> Path:
    """The library with this bug in it."""
    for folder in ("csrc", "tests/emulator"):
        shutil.copytree(build.ROOT / folder, tree / folder)
    path = tree / mutant.file
    pattern = r"\s+".join(map(re.escape, mutant.text.split()))
    source, count = re.subn(pattern, lambda _: mutant.replacement, path.read_text())
    assert count == 1, f"{mutant.name}: its text must occur once, not {count} times"
    path.write_text(source)
    # What the suite does not use costs time: fp16, and some tiles.
    for kernel in (tree / "tests/emulator").glob("*_sm*.cpp"):
        text = kernel.read_text().replace("F16>", "Bf16>").replace("F16{}", "Bf16{}")
        kernel.write_text(text)
    plan = tree / "csrc/cuda/down_proj_plan.h"
    text = plan.read_text()
    for tile in UNUSED_TILES:
        assert tile in text
        text = text.replace(tile, "")
    plan.write_text(text)
    return build.build_mutant(tree, mutant.sources)


@pytest.fixture(scope="session", autouse=True)
def needs_a_compiler():
    pytest.importorskip("pybind11")
    if build.compiler() is None:
        pytest.skip("no C++ compiler")


def test_unchanged_sources_are_green(problems):
    done = run_suite(build.build(), problems)
    assert done.returncode == 0, done.stdout + done.stderr


def is_of_a_plan(mutant: Mutant) -> bool:
    """Whether it needs plans and kernels compiled anew, which takes longest."""
    return mutant.suite == "forward" and mutant.file.endswith((".h", ".cpp"))


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=pytest.mark.slow if is_of_a_plan(m) else ()) for m in KILLED],
    ids=lambda m: m.name.replace(" ", "_"),
)
def test_planted_bug_turns_the_suite_red(mutant, problems, tmp_path):
    library = plant(mutant, tmp_path)
    try:
        done = run_suite(library, problems, mutant.suite)
    except subprocess.TimeoutExpired:
        return
    assert done.returncode != 0, "survived"


@pytest.mark.parametrize("mutant, reason", SURVIVORS, ids=lambda m: getattr(m, "name", None))
def test_known_survivors_survive(mutant, reason, problems, tmp_path):
    """If one is noticed after all, it belongs among the killed."""
    done = run_suite(plant(mutant, tmp_path), problems, mutant.suite)
    assert done.returncode == 0, done.stdout


def test_enough_are_planted():
    assert len(KILLED) >= 20 and len({m.name for m in KILLED}) == len(KILLED)

"""The criterion itself: the right computation, emulated, meets it; with one fault it does not.

Everything is emulated in fp32, rounded where a kernel rounds, so the faults are those of a kernel
and not of a library. `docs/reliability.md` holds the table of faults, and which test of which
criterion runs on which backend.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import problems
import pytest
import tolerance
import torch
from pages import table_of
from problems import Problem
from torch import Tensor

import lora_kernels as lk
from lora_kernels import criterion

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
TESTS = Path(__file__).parent
SHAPE = (160, 264, 272, 16)  # C2 looks at results of 4096 elements or more


# ---- the computation, and its faults -------------------------------------------------------------


def same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Emulation:
    """y and the gradients as a kernel makes them; each field is a step that a fault replaces."""

    product: Callable[[Tensor, Tensor], Tensor] = torch.mm  # x·W0ᵀ and dy·W0, in fp32
    y: Callable[[Tensor], Tensor] = same
    h: Callable[[Tensor], Tensor] = same  # before it is rounded
    mask: Callable[[Tensor], Tensor] = same  # in the forward pass
    mask_dx: Callable[[Tensor], Tensor] = same
    mask_da: Callable[[Tensor], Tensor] = same
    inverse: Callable[[float], float] = lambda inverse: inverse  # of 1/q
    sum_da: Callable[[Tensor, Tensor], Tensor] = torch.mm  # dhᵀ·x
    sum_db: Callable[[Tensor, Tensor], Tensor] = torch.mm
    h_of_db: Callable[[Tensor, Tensor], Tensor] = lambda h, undropped: h
    scale_da: float = 1.0
    lora_dx: float = 1.0
    operand: Callable[[Tensor], Tensor] = same  # of every product, as the instruction reads it

    def run(self, p: Problem) -> dict[str, Tensor]:
        dtype = p.x.dtype
        x, w, a, b, dy = (
            self.operand(t.float()) for t in (p.x, p.weight, p.lora_a, p.lora_b, p.dy)
        )
        kept, inverse = torch.ones(x.shape, dtype=torch.bool), 1.0
        if p.dropout_p > 0:
            kept = lk.dropout_mask(p.seed, x.shape, p.dropout_p)
            inverse = self.inverse(1 / lk.keep_probability(p.dropout_p))

        def dropped(mask: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.where(mask(kept), x, 0)

        def rounded(t: Tensor) -> Tensor:
            return self.operand(t.to(dtype).float())

        h = rounded(self.h(p.scaling * inverse * (dropped(self.mask) @ a.T)))
        undropped = rounded(p.scaling * (x @ a.T))
        dh = rounded(p.scaling * (dy @ b))
        y = self.product(x, w.T) + h @ b.T
        y = y if p.bias is None else y + p.bias.float()
        term = torch.where(self.mask_dx(kept), inverse * (dh @ a), 0)
        da = inverse * self.scale_da * self.sum_da(dh.T, dropped(self.mask_da))
        db = self.sum_db(dy.T, self.h_of_db(h, undropped))
        found = {
            "y": self.y(y), "x": self.product(dy, w) + self.lora_dx * term, "lora_a": da,
            "lora_b": db,
        }  # fmt: skip
        return {name: t.to(dtype) for name, t in found.items()}


def low(t: Tensor) -> Tensor:
    """Rounded to bf16 and back."""
    return t.bfloat16().float()


def in_parts(size: int, a: Tensor, b: Tensor, rounded: Callable, each: bool = False) -> Tensor:
    """a·b by slices of the depth: a 16-bit accumulator, or with `each` 16-bit partial sums."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], size):
        part = a[:, k : k + size] @ b[k : k + size]
        total = total + rounded(part) if each else rounded(total + part)
    return total


def without(columns: slice, a: Tensor, b: Tensor) -> Tensor:
    """a·b that misses these of the depth."""
    a = a.clone()
    a[:, columns] = 0
    return a @ b


def changed(t: Tensor, place: Any, value: Tensor | float | bool) -> Tensor:
    t = t.clone()
    t[place] = value
    return t


def swapped(t: Tensor) -> Tensor:
    return changed(t, [3, 4], t[[4, 3]])


def small(t: Tensor) -> Tensor:
    """Zeroed where it is smallest of all that are not zero."""
    flat = t.flatten().abs()
    return changed(t.flatten(), torch.where(flat > 0, flat, torch.inf).argmin(), 0).view(t.shape)


def cut_to_tf32(t: Tensor) -> Tensor:
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


COLUMN = (slice(None), 5)
FAULTS: dict[str, Emulation] = {
    "last k dropped": Emulation(functools.partial(without, slice(-1, None))),
    "a k16 slab missed": Emulation(functools.partial(without, slice(64, 80))),
    "two rows exchanged": Emulation(y=swapped),
    "one element zeroed": Emulation(y=lambda y: changed(y, (17, 33), 0)),
    "one small element zeroed": Emulation(y=small),
    "a 16-bit accumulator, rounded each k64": Emulation(lambda a, b: in_parts(64, a, b, low)),
    "dA accumulated in 16 bits": Emulation(sum_da=lambda a, b: in_parts(16, a, b, low)),
    "split-K partials of 16 bits": Emulation(lambda a, b: in_parts(136, a, b, low, True)),
    "h rounded to fp8": Emulation(h=lambda h: h.to(torch.float8_e4m3fn).float()),
    "a column of the mask inverted": Emulation(mask=lambda m: changed(m, COLUMN, ~m[COLUMN])),
    "one bit of the mask": Emulation(mask=lambda m: changed(m, (9, 5), ~m[9, 5])),
    "survivors not scaled": Emulation(inverse=lambda _: 1.0),
    "mask of dx shifted": Emulation(mask_dx=lambda m: m.roll(1, 1)),
    "dA without s": Emulation(scale_da=1 / 1.7),
    "undropped x in dA": Emulation(mask_da=torch.ones_like),
    "last token missed in dB": Emulation(sum_db=functools.partial(without, slice(-1, None))),
    "dB without dropout": Emulation(h_of_db=lambda h, undropped: undropped),
    "dx without its LoRA term": Emulation(lora_dx=0.0),
    "TF32 operands cut, not rounded": Emulation(operand=cut_to_tf32),
}


# ---- which criterion notices ---------------------------------------------------------------------

# Of the scales of W and B, as `problems.make` takes them; "early": B as it is early in training.
SCALES = {"normal": (1.0, 1.0), "W=0": (0.0, 1.0), "early": (1.0, 1e-3), "W=0, early": (0.0, 1e-3)}
CHECKS = {"C1": tolerance.assert_c1, "C2": tolerance.assert_c2, "C3": tolerance.assert_c3}
EXACT = 4  # problems


@functools.cache
def problem(kind: str, dtype: torch.dtype = torch.bfloat16) -> Problem:
    if kind.startswith("exact"):
        shape = (40, 48, 136, 8)
        return replace(problems.make_exact(shape, dtype, int(kind[-1])), bias=None)
    w, b = SCALES[kind]
    return problems.make(SHAPE, dtype, dropout_p=0.1, bias=False, w_scale=w, b_scale=b)


@functools.cache
def evaluated(kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """What the checks compare with: they ask for it each time."""
    p = problem(kind, dtype)
    return criterion.oracle(p), p.eager()


def failing(
    emulation: Emulation, kind: str, checks: dict[str, Callable], dtype=torch.bfloat16
) -> set[str]:
    """The names of the checks that the emulation does not meet on a problem."""
    p, found = problem(kind, dtype), set()
    got, (oracle, eager) = emulation.run(p), evaluated(kind, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tolerance, "oracle", lambda _: oracle)
        patch.setattr(Problem, "eager", lambda _: eager)
        for name, check in checks.items():
            try:
                check(p, got)
            except AssertionError:
                found.add(name)
    return found


def killers(emulation: Emulation) -> tuple[set[str], set[str]]:
    """The criteria that it does not meet: in any problem but those of B ~ 1e-3, and in those."""
    alone = {"C5": tolerance.assert_c1}
    found = failing(emulation, "normal", CHECKS) | failing(emulation, "W=0", alone)
    for seed in range(EXACT):
        found |= failing(emulation, f"exact {seed}", {"C4": tolerance.assert_c4})
    in_fp32 = {"C2 in float32": tolerance.assert_c2}
    found |= failing(emulation, "normal", in_fp32, torch.float32)
    early = failing(emulation, "early", CHECKS) | failing(emulation, "W=0, early", alone)
    return found, early


def test_the_right_computation_meets_every_criterion():
    assert killers(Emulation()) == (set(), set())


def criteria(cell: str) -> set[str]:
    return {name.strip() for name in cell.split(",")} - {"-"}


FAULT_ROWS = {row[0]: row[1:] for row in table_of(PAGE, "## Planted faults")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault):
    """By each of the criteria that the page names."""
    normal, early = killers(FAULTS[fault])
    named = [criteria(cell) for cell in FAULT_ROWS[fault]]
    assert named[0] and named[0] <= normal and named[1] <= early


def test_the_page_names_every_fault():
    assert list(FAULT_ROWS) == list(FAULTS)


# ---- which test of a criterion runs where --------------------------------------------------------


def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_tests_that_the_page_names_exist():
    rows = table_of(PAGE, "## Criterion")
    assert [row[0] for row in rows] == [f"C{i}" for i in range(1, 8)]
    for _, *cells in rows:
        for cell in cells:
            names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
            assert names or cell == "-", cell
            assert all(name in functions_of(file) for file, name in names), cell

"""Random calls that must be right: a Case says all about one, and its repr is Python to paste.

`check` judges y and every gradient by C1 against float64, and what must hold whatever the values:
no input is written to, outputs are contiguous and share no memory, gradients have their leaf's
dtype and shape, and only a mask that is drawn takes from the generator.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from problems import GRADS, Problem
from tolerance import assert_c1, assert_c1_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import dropout

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
SIXTEEN_BIT = ("bf16", "f16")
LAYOUTS = (
    "plain", "transposed", "sliced", "columns", "shifted", "expanded", "overlapping", "negated",
)  # fmt: skip
MODES = ("grad", "no_grad", "inference", "twice", "checkpoint", "checkpoint_reentrant")
WORK = 5e5  # largest M·N·K of a projection: a case takes milliseconds


@dataclass(frozen=True)
class Case:
    """One call. `sizes`: (N, r) of each projection; `layouts`: of x, weight, A, B, bias and dy."""

    call: str = "op"  # op, group or layer
    backend: str | None = None
    lead: tuple[int, ...] = (3,)
    k: int = 5
    sizes: tuple[tuple[int, int], ...] = ((4, 2),)
    dtype: str = "f32"
    adapter: str = "same"  # or f32, beside 16 bits
    autocast: str = ""  # or the 16-bit dtype that it casts to
    layouts: tuple[str, ...] = ("plain",) * 6
    bias: bool = True
    needs: tuple[str, ...] = GRADS
    scaling: float = 1.5
    p: float = 0.0
    seed: tuple[int, ...] | None = None  # None: drawn
    mode: str = "grad"
    data: int = 0


# ---- inputs --------------------------------------------------------------------------------------


def values(size: tuple[int, ...], dtype: torch.dtype, g: torch.Generator, fp16: bool) -> Tensor:
    """Normal, but of fp16 eighths: an h so small that fp16 has no digits for it is C1's limit."""
    if not fp16:
        return torch.randn(size, generator=g).to(dtype)
    eighths = torch.randint(-8, 9, size, generator=g) / 8
    off_grid = 1 + 2**-13 if dtype == torch.float32 else 1  # the cast to fp16 must round it back
    return (eighths * off_grid).to(dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t in another place in memory; of "expanded" and "overlapping" only some."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and t.dim() > 1 and t.shape[0] > 0:
        return t[:1].clone().expand_as(t)
    if layout == "overlapping" and t.numel() > 0:
        return t.flatten().as_strided(t.shape, (1,) * t.dim())
    if layout == "negated":
        return torch._neg_view(-t)
    if layout in ("plain", "overlapping") or t.dim() == 0:
        return t.clone()
    pad, step = {"sliced": (3, 1), "columns": (0, 2)}.get(layout, (0, 1))
    if layout == "shifted":  # no vector of more than one element is aligned
        memory = t.new_full((t.numel() + 1,), math.nan)
        return memory[1:].view(t.shape).copy_(t)
    memory = t.new_full((*t.shape[:-1], t.shape[-1] * step + pad), math.nan)
    view = memory[..., pad : pad + t.shape[-1] * step : step]
    return view.copy_(t)


def problems_of(case: Case) -> list[Problem]:
    """What each projection is given, before autocast; x is one tensor."""
    g = torch.Generator().manual_seed(case.data)
    dtype = DTYPES[case.dtype]
    adapter = torch.float32 if case.adapter == "f32" else dtype
    fp16 = "f16" in (case.dtype, case.autocast)

    def new(which: int, *size: int, of: torch.dtype = dtype) -> Tensor:
        return laid_out(values(size, of, g, fp16), case.layouts[which])

    x, found = new(0, *case.lead, case.k), []
    for i, (n, r) in enumerate(case.sizes):
        weight = new(1, n, case.k)
        a, b = new(2, r, case.k, of=adapter), new(3, n, r, of=adapter)
        bias = new(4, n) if case.bias else None
        out = DTYPES[case.autocast] if case.autocast and case.dtype != "f64" else dtype
        dy = new(5, *case.lead, n, of=out)
        seed = None if case.seed is None else torch.tensor([case.seed[0] + i, *case.seed[1:]])
        found.append(Problem(x, weight, a, b, bias, dy, case.scaling, case.p, seed))
    return found


def as_computed(p: Problem, case: Case, seed: Tensor | None) -> Problem:
    """The problem that the op solves: under autocast x, weight and bias are cast."""
    dtype = p.dy.dtype
    bias = None if p.bias is None else p.bias.to(dtype)
    return Problem(
        p.x.to(dtype), p.weight.to(dtype), p.lora_a, p.lora_b, bias, p.dy, p.scaling, p.dropout_p,
        seed,
    )  # fmt: skip


# ---- the call ------------------------------------------------------------------------------------


def forward(case: Case, parts: list[Problem], leaves: list[tuple]) -> tuple[Tensor, ...]:
    """ys by the call that the case names, of leaves (x, A, B, bias) for each projection."""
    x, named = leaves[0][0], dict(dropout_p=case.p, backend=case.backend)
    if case.call == "group":
        each = list(zip(*(one[1:] for one in leaves), strict=True))
        seeds = None if case.seed is None else [p.seed for p in parts]
        weights = [p.weight for p in parts]
        return tuple(
            lk.fused_lora_linear_group(
                x, weights, *map(list, each), scalings=case.scaling, seeds=seeds, **named
            )
        )
    p = parts[0]
    if case.call == "op":
        return (
            lk.fused_lora_linear(
                x, p.weight, *leaves[0][1:], scaling=case.scaling, seed=p.seed, **named
            ),
        )
    (n, r), on_meta = case.sizes[0], torch.device("meta")  # where an initialisation draws nothing
    layer = lk.LoRALinear(case.k, n, r, bias=case.bias, device=on_meta)
    layer.scaling, layer.lora_dropout = case.scaling, case.p
    for name, t in zip(("lora_a", "lora_b", "bias"), leaves[0][1:], strict=True):
        delattr(layer, name)  # a leaf of ours in the place of a parameter
        setattr(layer, name, t)
    layer.weight = torch.nn.Parameter(p.weight, requires_grad=False)
    with lk.use_backend(case.backend) if case.backend else contextlib.nullcontext():
        return (layer(x),)


def context(case: Case) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    if case.autocast:
        stack.enter_context(torch.autocast("cpu", dtype=DTYPES[case.autocast]))
    if case.mode == "no_grad":
        stack.enter_context(torch.no_grad())
    if case.mode == "inference":
        stack.enter_context(torch.inference_mode())
    return stack


def memory_of(parts: list[Problem]) -> Iterator[Tensor]:
    """Every byte that an input could reach, the padding included."""
    for p in parts:
        for t in vars(p).values():
            if isinstance(t, Tensor):
                yield torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def run(case: Case, parts: list[Problem], leaves: list[tuple]) -> tuple[Tensor, ...]:
    if not case.mode.startswith("checkpoint"):
        return forward(case, parts, leaves)
    flat = [t for one in leaves for t in one]

    def again(*flat):
        return forward(case, parts, [flat[i : i + 4] for i in range(0, len(flat), 4)])

    reentrant = case.mode.endswith("reentrant")
    with_rng = dict(use_reentrant=reentrant, preserve_rng_state=True)
    return checkpoint(again, *flat, **with_rng)


# ---- the judgement -------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Raises AssertionError if the call is not right, or whatever it raises itself."""
    parts = problems_of(case)
    x = parts[0].x.detach().requires_grad_("x" in case.needs)
    leaves = [
        (x, *(
            None if t is None else t.detach().requires_grad_(name in case.needs)
            for name, t in (("lora_a", p.lora_a), ("lora_b", p.lora_b), ("bias", p.bias))
        ))
        for p in parts
    ]  # fmt: skip
    before = [t.clone() for t in memory_of(parts)]
    torch.manual_seed(case.data)
    state = torch.get_rng_state()
    with context(case):
        ys = run(case, parts, leaves)
    assert_drawn(case, state)
    graded = {id(t) for one in leaves for t in one if t is not None and t.requires_grad}
    recording = case.mode not in ("no_grad", "inference") and bool(graded)
    got = gradients(case, parts, leaves, ys) if recording else {}
    for old, new in zip(before, memory_of(parts), strict=True):
        assert torch.equal(old, new), "an input was written to"
    for p, y in zip(parts, ys, strict=True):
        assert y.shape == p.dy.shape and y.dtype == p.dy.dtype, f"y is {y.dtype} {list(y.shape)}"
        assert y.is_contiguous(), "y is not contiguous"
        assert y.requires_grad == recording, f"y.requires_grad is {y.requires_grad}"
    if resolved(case, parts[0]) != "reference":
        assert_no_memory_shared(parts, [*ys, *got.values()])
    judge(case, parts, ys, got)


def assert_drawn(case: Case, state: Tensor) -> None:
    given = case.seed is not None and case.call != "layer"
    draws = dropout.drops(case.p) and not given
    drawn = not torch.equal(state, torch.get_rng_state())
    assert drawn == draws, f"the generator was {'' if drawn else 'not '}drawn from"


def gradients(case, parts, leaves, ys) -> dict[tuple[int, str], Tensor]:
    """By projection and name, of those that are needed; "x" once, of projection 0."""
    wanted = {}
    for i, one in enumerate(leaves):
        for name, leaf in zip(GRADS, one, strict=True):
            if leaf is not None and leaf.requires_grad and not (name == "x" and i):
                wanted[i, name] = leaf
    dys = [p.dy for p in parts]
    if case.mode == "checkpoint_reentrant":  # it serves backward() alone
        torch.autograd.backward(ys, dys)
        found = [leaf.grad for leaf in wanted.values()]
    else:
        grads = torch.autograd.grad
        if case.mode == "twice":
            first = grads(ys, list(wanted.values()), dys, retain_graph=True)
        found = grads(ys, list(wanted.values()), dys)
        if case.mode == "twice":
            for a, b in zip(first, found, strict=True):
                assert torch.equal(a, b), "a second backward differs"
    for (i, name), leaf, grad in zip(wanted, wanted.values(), found, strict=True):
        assert grad is not None, f"{name} of projection {i} has no gradient"
        about = f"the gradient of {name} is {grad.dtype} {list(grad.shape)}"
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, about
    return dict(zip(wanted, found, strict=True))


def assert_no_memory_shared(parts: list[Problem], results: list[Tensor]) -> None:
    """Of our own; plain PyTorch hands a dy on as a bias's gradient, and views of what it made."""
    assert not any(t._is_view() for t in results), "a result is a view"
    inputs = {t.untyped_storage().data_ptr() for p in parts for t in vars(p).values()
              if isinstance(t, Tensor) and t.numel()}  # fmt: skip
    own = [t.untyped_storage().data_ptr() for t in results if t.numel()]
    assert not inputs & set(own), "a result shares memory with an input"
    assert len(own) == len(set(own)), "results share memory"


def judge(case: Case, parts: list[Problem], ys, got) -> None:
    torch.manual_seed(case.data)  # the masks were drawn from here, in the order of projections
    solved, name = [], resolved(case, parts[0])
    for i, (p, y) in enumerate(zip(parts, ys, strict=True)):
        seed = None if case.call == "layer" else p.seed
        if dropout.drops(case.p) and seed is None:
            seed = dropout.draw_seed(torch.device("cpu"))
        elif seed is None:
            seed = torch.zeros(2, dtype=torch.int64)  # of a mask that keeps all
        solved.append(as_computed(p, case, seed))
        results = {"y": y.detach()} | {n: t for (j, n), t in got.items() if j == i}
        if len(parts) > 1:
            results.pop("x", None)
        narrow = {n: as_rounded(n, t, p) for n, t in results.items()}
        lenient = backends.eager_like(name, solved[-1].x.dtype)
        assert_c1(solved[-1], narrow, eager_like=lenient)
    if len(parts) > 1 and (0, "x") in got:
        dx = as_rounded("x", got[0, "x"], parts[0])
        # The reference is a call each: autograd adds up what each has rounded.
        assert_c1_group(solved, dx, eager_like=lenient or name == "reference")


def as_rounded(name: str, t: Tensor, p: Problem) -> Tensor:
    """A gradient of what autocast cast, in the 16 bits that it must fit."""
    if name not in ("x", "bias") or t.dtype == p.dy.dtype:
        return t
    narrow = t.to(p.dy.dtype)
    assert torch.equal(narrow.to(t.dtype), t), f"the gradient of {name} was not rounded"
    return narrow


def resolved(case: Case, p: Problem) -> str:
    if case.backend:
        return case.backend
    with context(case):
        return lk.explain(p.x, p.weight, p.lora_a, p.lora_b, p.bias).backend


# ---- the strategy --------------------------------------------------------------------------------

SIDES = (1, 0, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 63, 65, 100, 129, 257)
RANKS = (1, 0, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 130, 257)
SCALINGS = (1.0, 1.5, 0.0, -2.0, 0.1, 64.0, 2.0**-60, 2.0**60, -(2.0**100))
FP16_SCALINGS = SCALINGS[:6]  # a y that does not fit into fp16 proves nothing
PROBABILITIES = (0.0, 0.1, 0.5, 0.9, 1.0, 2.0**-15, 1e-5, 0.99999, 0.3)


@st.composite
def cases(draw, backends: tuple[str, ...]) -> Case:
    """Calls that the op serves; the simplest first, for shrinking."""
    call = draw(st.sampled_from(("op", "group", "layer")))
    backend = draw(st.sampled_from((None, *backends)))
    dtype = draw(st.sampled_from(tuple(DTYPES)))
    if dtype == "f64" and backend == "cpu":
        backend = None
    autocast = draw(st.sampled_from(("", "", *SIXTEEN_BIT)))
    inside = autocast if autocast and dtype != "f64" else dtype
    low = inside in SIXTEEN_BIT
    wide = draw(st.booleans()) if low else False
    if autocast and dtype != inside:
        wide = True  # A and B are not cast: they fit as float32 alone
        if dtype in SIXTEEN_BIT:
            autocast = ""  # x and A of one 16-bit dtype in autocast of the other
            wide = draw(st.booleans())
    lead = tuple(draw(st.lists(st.sampled_from(SIDES), max_size=4)))
    k = draw(st.sampled_from(SIDES))
    count = draw(st.integers(1, 3)) if call == "group" else 1
    each = st.tuples(st.sampled_from(SIDES), st.sampled_from(RANKS))
    sizes = tuple(draw(each) for _ in range(count))
    while math.prod(lead) * max(k, 1) * (max(n for n, _ in sizes) or 1) > WORK:
        lead = tuple(d // 2 for d in lead)
    p = draw(st.sampled_from(PROBABILITIES))
    scalings = FP16_SCALINGS if "f16" in (dtype, autocast) else SCALINGS
    needs = tuple(n for n in GRADS if draw(st.booleans()))
    seed = None
    if draw(st.booleans()):
        words = st.integers(-(2**63), 2**63 - 4)
        seed = (draw(words), draw(words))
        if draw(st.booleans()):
            seed = (*seed, draw(st.integers(0, 2**32)), draw(st.integers(0, 2**33)))
    return Case(
        call, backend, lead, k, sizes, dtype, "f32" if wide else "same", autocast,
        tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(6)), draw(st.booleans()), needs,
        draw(st.sampled_from(scalings)), p, seed, draw(st.sampled_from(MODES)),
        draw(st.integers(0, 9)),
    )  # fmt: skip

"""Projections of one input in one call: the bits of separate calls, one dx, nothing unneeded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import problems
import pytest
import tolerance
import torch
from problems import Problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import composed

OPS = torch.ops.lora_kernels
OWN = ("lora_a", "lora_b", "bias")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# name -> M, K and (N, r) of each projection
SHAPES = {
    "one_projection": (20, 24, [(16, 4)]),
    "gate_up": (33, 65, [(47, 7), (47, 7)]),
    "grouped_queries": (101, 96, [(64, 16), (24, 16), (24, 8)]),
    "no_rank_between": (9, 11, [(10, 3), (10, 0), (7, 2)]),
    "ranks_past_panels": (20, 30, [(40, 300), (24, 1), (20, 130)]),
    "vendor_and_own_down_proj": (20, 520, [(24, 16), (24, 2)]),  # either side of `few_rows`
    "blocks_and_tails": (230, 600, [(70, 16), (140, 33)]),  # of 96 rows and of 256 columns
    "vendor_beside_small": (40, 60, [(4, 3), (90, 5), (0, 2)]),
    "no_rows": (0, 12, [(5, 3), (6, 2)]),
    "no_outputs_first": (6, 10, [(0, 3), (5, 2)]),
    "no_inputs": (6, 0, [(4, 2), (3, 1)]),
}


@dataclass(frozen=True)
class Group:
    """Problems that share x and dropout_p."""

    parts: list[Problem]

    def leaves(self) -> tuple[Tensor, list[list[Tensor | None]]]:
        """x and the lists of A, B and bias, all of which require grad."""
        x = self.parts[0].x.detach().clone().requires_grad_()
        lists = [
            [None if t is None else t.detach().clone().requires_grad_() for t in kind]
            for kind in zip(*((p.lora_a, p.lora_b, p.bias) for p in self.parts), strict=True)
        ]
        return x, lists

    def ys(self, backend, x, lists, separate=False, **changes) -> list[Tensor]:
        weights = [p.weight for p in self.parts]
        shared = {"dropout_p": self.parts[0].dropout_p, "backend": backend} | changes
        scalings, seeds = ([getattr(p, n) for p in self.parts] for n in ("scaling", "seed"))
        if self.parts[0].dropout_p == 0 or changes.get("seeds", 0) is None:
            seeds = None
        shared.pop("seeds", None)
        if not separate:
            return lk.fused_lora_linear_group(
                x, weights, *lists, scalings=scalings, seeds=seeds, **shared
            )
        each = zip(weights, *lists, strict=True)
        return [
            lk.fused_lora_linear(x, *o, scaling=s, seed=seeds[i] if seeds else None, **shared)
            for i, (o, s) in enumerate(zip(each, scalings, strict=True))
        ]

    def run(self, backend, separate=False, **changes) -> tuple[list[dict[str, Tensor]], Tensor]:
        """([y and own gradients of each projection], dx)."""
        x, lists = self.leaves()
        ys = self.ys(backend, x, lists, separate, **changes)
        inputs = [x, *(t for kind in lists for t in kind if t is not None)]
        dx, *found = torch.autograd.grad(ys, inputs, [p.dy for p in self.parts])
        grads = iter(found)
        results = [{"y": y.detach()} for y in ys]
        for name, kind in zip(OWN, lists, strict=True):
            for result, t in zip(results, kind, strict=True):
                if t is not None:
                    result[name] = next(grads)
        return results, dx


def make(shape="grouped_queries", dtype=torch.float32, *, p=0.0, lead=None, adapters=()) -> Group:
    """Projections with scalings, seeds and biases of their own; every second has no bias."""
    m, k, sizes = SHAPES[shape] if isinstance(shape, str) else shape
    parts = [
        problems.make(
            (m, n, k, r), dtype, dropout_p=p, lead=lead, scaling=1.7 - i, bias=i % 2 == 0,
            generator_seed=i, adapter_dtype=adapters[i] if adapters else None,
        )
        for i, (n, r) in enumerate(sizes)
    ]  # fmt: skip
    seeds = [torch.tensor([77 + i, i]) if p > 0 else None for i in range(len(parts))]
    return Group([replace(q, x=parts[0].x, seed=s) for q, s in zip(parts, seeds, strict=True)])


def assert_like_separate(
    group: Group, backend: str, eager_like: bool, sum_eager_like: bool | None = None
) -> None:
    got, dx = group.run(backend)
    separate, _ = group.run(backend, separate=True)
    for part, ours, theirs in zip(group.parts, got, separate, strict=True):
        assert torch.equal(ours["y"], theirs["y"])
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            if backend == "cpu":
                assert torch.equal(ours[name], theirs[name]), name
        tolerance.assert_c1(part, ours, eager_like=eager_like)
    # Only the C++ backend rounds the sum once: the reference's calls each round a dx.
    if sum_eager_like is None:
        sum_eager_like = backend != "cpu"
    tolerance.assert_c1_group(group.parts, dx, eager_like=sum_eager_like)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(backend, eager_like, shape, dtype, p):
    assert_like_separate(make(shape, dtype, p=p), backend, eager_like)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_mixed_adapter_dtypes(backend, eager_like, p):
    adapters = (torch.float32, torch.bfloat16, torch.float32)
    assert_like_separate(make(dtype=torch.bfloat16, p=p, adapters=adapters), backend, eager_like)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4), (1, 1, 3)], ids=str)
def test_leading_dimensions(backend, eager_like, lead):
    m = torch.Size(lead).numel()
    group = make((m, 20, [(12, 4), (6, 3)]), p=0.3, lead=lead)
    got, dx = group.run(backend)
    assert got[1]["y"].shape == (*lead, 6) and dx.shape == (*lead, 20)
    assert_like_separate(group, backend, eager_like)


@pytest.mark.parametrize("layout", ["transposed_x", "expanded_dy"])
def test_strides(backend, eager_like, layout):
    group = make((30, 24, [(12, 4), (12, 3)]), p=0.2)
    x, dy = group.parts[0].x.t().contiguous().t(), group.parts[0].dy[0, 0].expand(30, 12)
    changed = {"x": x} if layout == "transposed_x" else {"dy": dy}
    group = Group([replace(p, **changed) for p in group.parts])
    assert_like_separate(group, backend, eager_like)


def test_panels_of_a_16bit_dx():
    """Two row panels and two column panels, the second with an offset into mask and dx."""
    group = make((130, 70, [(33000, 3), (40, 5)]), torch.bfloat16, p=0.3)
    tolerance.assert_c1_group(group.parts, group.run("cpu")[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_thread_count_changes_no_bit(dtype):
    group, results = make("blocks_and_tails", dtype, p=0.3), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            got, _ = group.run("cpu")
        finally:
            torch.set_num_threads(1)
        results.append([t for one in got for n, t in one.items() if n != "y"])  # y: the vendor's
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_float64(backend):
    group = make(dtype=torch.float64, p=0.3)
    if backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match=r"no torch\.float64 kernels"):
            group.run(backend)
        return
    got, dx = group.run(backend)
    for part, one in zip(group.parts, got, strict=True):
        tolerance.assert_c1(part, one, eager_like=True)
    tolerance.assert_c1_group(group.parts, dx, eager_like=True)
    if backend == "reference":
        automatic, _ = group.run(None)
        assert all(torch.equal(p["y"], q["y"]) for p, q in zip(got, automatic, strict=True))


# ---- dropout and scalings ------------------------------------------------------------------------


def test_drawn_seeds_are_those_of_separate_calls(backend):
    group = make(p=0.3)
    torch.manual_seed(5)
    got, _ = group.run(backend, seeds=None)
    after = torch.rand(())
    torch.manual_seed(5)
    separate, _ = group.run(backend, separate=True, seeds=None)
    assert torch.equal(after, torch.rand(())), "as many draws"
    for ours, theirs in zip(got, separate, strict=True):
        assert torch.equal(ours["y"], theirs["y"])


def test_each_projection_has_its_own_mask(backend):
    """With W = 0, A = B = 1 an output counts what a mask keeps: here column by column, x being a
    unit matrix."""
    k, p = 64, 0.4
    x, ones = torch.eye(k), torch.ones(1, k)
    seeds = [torch.tensor([3, 1]), torch.tensor([3, 2])]
    args = ([torch.zeros(1, k)] * 2, [ones] * 2, [torch.ones(1, 1)] * 2)
    run = dict(scalings=1.0, dropout_p=p, backend=backend)
    ys = lk.fused_lora_linear_group(x, *args, seeds=seeds, **run)
    masks = [lk.dropout_mask(seed, x.shape, p) for seed in seeds]
    for y, mask in zip(ys, masks, strict=True):
        assert torch.equal(y[:, 0] != 0, mask.diagonal())
    assert not torch.equal(ys[0], ys[1])
    one, other = lk.fused_lora_linear_group(x, *args, **run)
    assert not torch.equal(one, other), "drawn seeds differ too"
    one, other = lk.fused_lora_linear_group(x, *args, seeds=[seeds[0], None], **run)
    assert torch.equal(one, ys[0]) and not torch.equal(other, ys[1])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_projection_that_is_off(backend, p):
    """Scaling 0: the frozen linear and zero gradients, although A holds NaN, beside one that is
    on."""
    group = make((21, 30, [(12, 4), (14, 5), (12, 0)]), p=p)
    on, off, no_rank = group.parts
    off = replace(off, scaling=0.0, lora_a=torch.full_like(off.lora_a, torch.nan))
    got, dx = Group([on, off, no_rank]).run(backend)
    linear = lk.fused_lora_linear(
        off.x, off.weight, off.lora_a, off.lora_b, off.bias, scaling=0.0, backend=backend
    )
    assert torch.equal(got[1]["y"], linear)
    assert all((got[1][name] == 0).all() for name in ("lora_a", "lora_b"))
    clean = replace(off, lora_a=torch.zeros_like(off.lora_a))
    tolerance.assert_c1_group([on, clean, no_rank], dx, eager_like=True)
    tolerance.assert_c1(on, got[0], eager_like=True)


def test_one_scaling_for_all(backend):
    group = make()
    group = Group([replace(p, scaling=2.0) for p in group.parts])
    x, lists = group.leaves()
    weights = [p.weight for p in group.parts]
    for scalings in (2, 2.0, (2.0, 2, 2.0)):
        ys = lk.fused_lora_linear_group(x, weights, *lists, scalings=scalings, backend=backend)
        separate = group.ys(backend, x, lists, separate=True)
        assert all(torch.equal(p, q) for p, q in zip(ys, separate, strict=True))


# ---- only what is needed -------------------------------------------------------------------------

# (x, then the index of a projection and the name of what requires grad)
SUBSETS = {
    "x": (True, []),
    "one_a": (False, [(1, "lora_a")]),
    "one_b": (False, [(0, "lora_b")]),
    "one_bias": (False, [(2, "bias")]),
    "a_and_other_b": (False, [(0, "lora_a"), (2, "lora_b")]),
    "x_and_one_b": (True, [(1, "lora_b")]),
    "none": (False, []),
}


def flop_counter() -> FlopCounterMode:
    def addmm_(out, a, b, **kwargs):  # PyTorch has no formula for the GEMM in place
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def flops_of(group: Group, need_x: bool, needs, used=(0, 1, 2)) -> int:
    """What a backward pass has to multiply."""
    total = 0
    for i, p in enumerate(group.parts):
        if i not in used:
            continue
        (n, k), r, m = p.weight.shape, p.lora_a.shape[0], p.x.shape[:-1].numel()
        need_a, need_b = ((i, name) in needs for name in ("lora_a", "lora_b"))
        total += 2 * m * (
            (r * n if need_x or need_a else 0) + (k * (n + r) if need_x else 0)
            + (r * k if need_a else 0) + (r * n if need_b else 0)
        )  # fmt: skip
    return total


@pytest.mark.parametrize("need_x, needs", SUBSETS.values(), ids=SUBSETS)
def test_requires_grad_subsets(backend, need_x, needs):
    group = make(p=0.3)
    full, dx = group.run(backend)
    x, lists = group.leaves()
    x.requires_grad_(need_x)
    for name, kind in zip(OWN, lists, strict=True):
        for i, t in enumerate(kind):
            if t is not None:
                t.requires_grad_((i, name) in needs)
    ys = group.ys(backend, x, lists)
    inputs = [x] * need_x + [lists[OWN.index(name)][i] for i, name in needs]
    # One node for the group: all its outputs require grad, or none does.
    assert all(y.requires_grad for y in ys) or backend == "reference" or not inputs
    if not inputs:
        return
    on = [i for i, y in enumerate(ys) if y.requires_grad]
    with flop_counter() as counter:
        grads = torch.autograd.grad([ys[i] for i in on], inputs, [group.parts[i].dy for i in on])
    if backend != "reference":
        assert counter.get_total_flops() == flops_of(group, need_x, needs)
    expected = [dx] * need_x + [full[i][name] for i, name in needs]
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("used", [(0,), (2,), (0, 1), ()], ids=str)
def test_unused_outputs_are_skipped(backend, used):
    group = make(p=0.3)
    x, lists = group.leaves()
    ys = group.ys(backend, x, lists)
    outputs = [ys[i] for i in used] or [x.sum()]
    dys = [group.parts[i].dy for i in used] or [torch.ones(())]
    with flop_counter() as counter:
        torch.autograd.backward(outputs, dys)
    needs = [(i, name) for i in used for name in OWN]
    if backend != "reference":
        assert counter.get_total_flops() == flops_of(group, bool(used), needs, used)
    for kind in lists:
        for i, t in enumerate(kind):
            assert t is None or (t.grad is None) == (i not in used)
    if used:
        tolerance.assert_c1_group([group.parts[i] for i in used], x.grad, eager_like=True)


def test_what_is_saved_for_backward(backend):
    """x once, and of each projection W, A, B, h and its seed."""
    if backend == "reference":
        pytest.skip("the definition saves what autograd saves")
    group, saved = make(p=0.3), []
    x, lists = group.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group.ys(backend, x, lists)
    assert len(saved) == 1 + 5 * 3
    known = {t.data_ptr() for t in (x, *lists[0], *lists[1])}
    known |= {t.data_ptr() for p in group.parts for t in (p.weight, p.seed)}
    extra = [t for t in saved if t.data_ptr() not in known]
    assert [t.shape for t in extra] == [(101, 16), (101, 16), (101, 8)]


def test_flops_of_the_forward_pass(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch")
    group = make(p=0.3)
    x, lists = group.leaves()
    with flop_counter() as counter:
        group.ys(backend, x, lists)
    each = ((p.weight.shape, p.lora_a.shape[0]) for p in group.parts)
    assert counter.get_total_flops() == sum(2 * 101 * (n * k + r * (n + k)) for (n, k), r in each)


# ---- backends ------------------------------------------------------------------------------------


@pytest.fixture
def toy():
    """A backend that knows nothing of groups, with a record of what its backward is asked for."""
    needs = []

    def backward(*args):
        needs.append(args[-4:])
        return composed.backward(*args)

    backends.register(lk.Backend("toy", "a test", composed.forward, backward))
    yield needs
    backends.unregister("toy")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_backend_without_group_functions(toy, dtype, p):
    assert_like_separate(make(dtype=dtype, p=p), "toy", True)
    assert toy[:3] == [(True, True, True, i != 1) for i in range(3)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_more_projections_than_one_call_takes(size):
    """In slices: the same results, and the dx of all of them added up."""
    group = make(p=0.3)
    parts, sizes = group.parts, []

    def counted(run):
        def call(x, *lists):
            sizes.append(len(lists[0]))
            return run(x, *lists)

        return call

    flow = counted(composed.group_forward), counted(composed.group_backward)
    forward, backward = composed.sliced_flow(*flow, lambda: size)
    x, threshold = parts[0].x, 4915
    ws, a, b, biases, seeds, dys = (
        [getattr(p, n) for p in parts] for n in ("weight", "lora_a", "lora_b", "bias", "seed", "dy")
    )
    scalars = (seeds, threshold, [p.scaling for p in parts], [1.0] * 3)
    ys, hs = forward(x, ws, a, b, biases, *scalars)
    flags = [True] * 3
    dx, *grads = backward(x, dys, ws, a, b, hs, *scalars, flags, flags, True, flags, flags, flags)
    assert sizes == 2 * {1: [1, 1, 1], 2: [2, 1], 3: [3]}[size]
    for i, part in enumerate(parts):
        found = {"y": ys[i]} | {name: g[i] for name, g in zip(OWN, grads, strict=True)}
        tolerance.assert_c1(part, found, eager_like=True)
    tolerance.assert_c1_group(parts, dx, eager_like=True)


def test_a_backend_that_is_named_serves_or_raises():
    group = make()
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        group.run("nonsense")
    with lk.use_backend("composed"):
        got, _ = group.run(None)
    expected, _ = group.run("composed")
    assert all(torch.equal(p["y"], q["y"]) for p, q in zip(got, expected, strict=True))


# ---- bad input -----------------------------------------------------------------------------------


def call(**changes):
    args = dict(
        x=torch.randn(5, 8), weights=[torch.randn(6, 8), torch.randn(4, 8)],
        lora_as=[torch.randn(3, 8), torch.randn(2, 8)],
        lora_bs=[torch.randn(6, 3), torch.randn(4, 2)],
    )  # fmt: skip
    return lk.fused_lora_linear_group(**(args | {"scalings": 1.0} | changes))


WEIGHT = torch.randn(6, 8)
BAD = {
    "empty": (dict(weights=[]), ValueError, "weights must hold one tensor a projection, but is"),
    "a_tensor": (dict(weights=WEIGHT), TypeError, "weights must be a sequence .* got Tensor; put"),
    "not_a_sequence": (dict(seeds=3), TypeError, "seeds must be a sequence .* but got int"),
    "fewer_as": (dict(lora_as=[WEIGHT]), ValueError, "lora_as must have .* 2 weights, but has 1"),
    "more_biases": (dict(biases=[None] * 3), ValueError, "biases must have .* but has 3"),
    "fewer_scalings": (dict(scalings=[1.0]), ValueError, "scalings must have .* but has 1"),
    "fewer_seeds": (dict(seeds=[]), ValueError, "seeds must have .* but has 0"),
    "none_for_a_tensor": (
        dict(weights=[WEIGHT, None]), TypeError, "projection 1: weight must be a Tensor"
    ),
    "shape": (
        dict(weights=[WEIGHT, torch.randn(4, 9)]), ValueError,
        r"projection 1: x.size\(-1\) = 8 must equal weight.size\(1\) = 9",
    ),
    "dtype": (
        dict(weights=[WEIGHT.bfloat16(), WEIGHT[:4]]), ValueError,
        "projection 0: weight must have x's dtype torch.float32, but got torch.bfloat16",
    ),
    "tensor_scaling": (
        dict(scalings=torch.ones(2)), TypeError, "projection 0: scaling must be a number"
    ),
    "nan_scaling": (
        dict(scalings=[1.0, float("nan")]), ValueError, "projection 1: scaling must be finite"
    ),
    "probability": (dict(dropout_p=1.5), ValueError, "between 0 and 1, but got 1.5"),
    "probabilities": (dict(dropout_p=[0.1, 0.1]), TypeError, "dropout_p must be a number"),
    "seed": (
        dict(dropout_p=0.1, seeds=[torch.zeros(2, dtype=torch.int64), torch.zeros(2)]), ValueError,
        "projection 1: seed must be an int64 tensor",
    ),
    "trained_weight": (
        dict(weights=[WEIGHT, torch.randn(4, 8, requires_grad=True)]), RuntimeError,
        "projection 1: weight requires grad, but this op treats it as frozen",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=f"^fused_lora_linear_group: .*{message}"):
        call(**changes)


def test_sequences_of_any_kind():
    layers = [lk.LoRALinear(8, n, 3) for n in (6, 4)]
    kinds = (tuple, list, torch.nn.ParameterList)
    weights, lora_as, lora_bs = (
        kind(getattr(m, name) for m in layers)
        for kind, name in zip(kinds, ("weight", "lora_a", "lora_b"), strict=True)
    )
    x = torch.randn(5, 8)
    ys = lk.fused_lora_linear_group(x, weights, lora_as, lora_bs, scalings=1.0)
    assert [tuple(y.shape) for y in ys] == [(5, 6), (5, 4)]


def test_direct_calls_of_the_ops_do_not_crash():
    """Lists of different lengths, and rows that do not fit: a message, not a wild read."""
    x, w, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
    with pytest.raises(RuntimeError, match="every list must have one entry a projection"):
        OPS.forward_group(x, [w, w], [a], [b, b], [None] * 2, [None] * 2, 0, [1.0] * 2, [1.0] * 2)
    with pytest.raises(RuntimeError, match="every list must have one entry a projection"):
        OPS.forward_group(x, [], [], [], [], [], 0, [], [])
    flags = ([False] * 2, [False] * 2, True, [True] * 2, [True] * 2, [True] * 2)
    rest = ([w, w], [a, a], [b, b], [torch.randn(5, 3)] * 2, [None] * 2, 0, [1.0] * 2, [1.0] * 2)
    with pytest.raises(RuntimeError, match="backward_group: the number of rows of dy is 4"):
        needs = (*flags[:3], *([[False] * 2] * 3))
        OPS.backward_group(x, [torch.randn(5, 6), torch.randn(4, 6)], *rest, *needs)
    with pytest.raises(RuntimeError, match=r"weight_grad: h\.size"):
        OPS.backward_group(x[:3], [torch.randn(5, 6)] * 2, *rest, *flags)


# ---- as PyTorch sees it --------------------------------------------------------------------------


def op_calls():
    group = make((6, 10, [(5, 3), (4, 2)]), p=0.3)
    x, (lora_as, lora_bs, biases) = group.leaves()
    ws, seeds, dys = ([getattr(p, n) for p in group.parts] for n in ("weight", "seed", "dy"))
    # Strides that a zero gradient must not take over: a fake has none to tell.
    detached = ([t.detach().t().contiguous().t() for t in ts] for ts in (lora_as, lora_bs))
    low = (x.detach(), dys, ws, *detached, [torch.randn(6, 3), torch.randn(6, 2)], seeds)
    some = (True, [True, False], [False, True], [True, True])
    cast = (*low[:6], [seeds[0], None])
    biases = [biases[0], x.new_empty(0)]
    one = [biases[0].detach(), None]
    return {
        "forward": (OPS.forward_group, (low[0], *low[2:5], one, cast[6], 9, [0.5] * 2, [2.0] * 2)),
        "backward": (
            OPS.backward_group,
            (*cast, 9, [0.5] * 2, [2.0] * 2, [False] * 2, [True, False], *some),
        ),
        "linear": (
            OPS.lora_linear_group, (x, ws, lora_as, lora_bs, biases, seeds, [0.5, 2.0], 0.3, "")
        ),
        "linear_off": (
            OPS.lora_linear_group,
            (x, ws, lora_as, lora_bs, biases, [], [0.0, 2.0], 0.0, "composed"),
        ),
        "linear_backward": (OPS.lora_linear_group_backward, (*low, [0.5, 0.0], 0.3, "", *some)),
        "linear_backward_composed": (
            OPS.lora_linear_group_backward, (*low[:6], [], [0.5, 2.0], 0.0, "composed", *some)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    op, args = op_calls()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name, p", [("cpu", 0.3), ("composed", 0.0)])
def test_compiled_equals_eager(name, p):
    """fullgraph, dynamic shapes, one output unused, a bias in part: the same bits."""
    group = make((6, 10, [(5, 3), (4, 0), (4, 2)]), p=p)
    _, lists = group.leaves()
    leaves = [t for kind in lists for t in kind if t is not None]

    def step(x):
        ys = group.ys(name, x, lists)
        return ys[0].sin(), ys[2].cos()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        x = torch.randn(rows, 10, requires_grad=True)
        results = []
        for f in (step, compiled):
            ys = f(x)
            grads = torch.autograd.grad(
                [y.sum() for y in ys], (x, *leaves), allow_unused=True, materialize_grads=True
            )
            results.append((*ys, *grads))
        for eager, other in zip(*results, strict=True):
            assert torch.equal(eager, other)


def test_compiled_under_autocast():
    """With drawn seeds, and a scaling that is an argument."""
    group = make((16, 32, [(8, 2), (8, 2)]), p=0.3)
    x, lists = group.leaves()
    weights = [p.weight for p in group.parts]

    def f(x, scaling):
        return lk.fused_lora_linear_group(x, weights, *lists, scalings=[scaling, 1], dropout_p=0.3)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for scaling in (0.5, 0.75):
            ys = compiled(x, scaling)
        again = compiled(x, scaling)
    assert [y.dtype for y in ys] == [torch.bfloat16] * 2
    assert not torch.equal(ys[0], again[0]), "every call must draw masks of its own"
    sum(y.float().sum() for y in ys).backward()
    assert all(t.grad is not None for t in (x, *lists[0], *lists[1]))


def test_inductor():
    """The default compiler, which has to lower an op of lists."""
    group = make((16, 32, [(8, 2), (8, 2)]), p=0.3)
    x, lists = group.leaves()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = group.ys(None, x, lists)
        ys = torch.compile(lambda x: group.ys(None, x, lists), fullgraph=True)(x)
    assert all(torch.equal(p, q) for p, q in zip(ys, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_masks(backend, reentrant):
    group = make(p=0.4)
    x, lists = group.leaves()
    leaves = [x, *(t for kind in lists for t in kind if t is not None)]

    def f(x):
        return tuple(group.ys(backend, x, lists, seeds=None))

    results = []
    for run in (f, lambda x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        ys = run(x)
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(ys, [p.dy for p in group.parts])
        results.append([*ys, *(leaf.grad.clone() for leaf in leaves)])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_equals_the_mixed_dtype_call(backend, dtype):
    group = make(p=0.3)
    cast = [
        replace(
            p, x=p.x.to(dtype), weight=p.weight.to(dtype), dy=p.dy.to(dtype),
            bias=None if p.bias is None else p.bias.to(dtype),
        )
        for p in group.parts
    ]  # fmt: skip
    expected, dx = Group(cast).run(backend)
    x, lists = group.leaves()
    saved = []
    with (
        torch.autocast("cpu", dtype=dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ys = group.ys(backend, x, lists)
    if backend != "reference":
        weights = {p.weight.data_ptr() for p in group.parts}
        assert weights <= {t.data_ptr() for t in saved}, "saved uncast"
    torch.autograd.backward(ys, [p.dy for p in cast])
    assert torch.equal(x.grad, dx.float())
    for i, (y, one) in enumerate(zip(ys, expected, strict=True)):
        assert torch.equal(y, one["y"])
        for name, kind in zip(OWN, lists, strict=True):
            assert kind[i] is None or torch.equal(kind[i].grad, one[name].float())


def test_double_backward_is_a_clear_error():
    group = make()
    for name in ("cpu", "composed"):
        x, lists = group.leaves()
        y = group.ys(name, x, lists)[1]
        with pytest.raises(RuntimeError, match=r"fused_lora_linear_group: double backward.*'refer"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
    args = op_calls()["linear"][1]
    ys, _ = OPS.lora_linear_group(*args)
    with pytest.raises(RuntimeError, match="fused_lora_linear_group: double backward"):
        torch.autograd.grad(ys[0].sum(), args[0], create_graph=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["composed", "reference"])
def test_gradcheck(name, p):
    group = make((4, 6, [(5, 3), (3, 2)]), torch.float64, p=p)
    x, (lora_as, lora_bs, biases) = group.leaves()

    def f(x, a0, a1, b0, b1, bias):
        return tuple(group.ys(name, x, [[a0, a1], [b0, b1], [bias, None]]))

    args = (x, *lora_as, *lora_bs, biases[0])
    assert torch.autograd.gradcheck(f, args, nondet_tol=0.0)
    if name == "reference":
        assert torch.autograd.gradgradcheck(f, args, nondet_tol=0.0)


def test_outputs_may_be_modified_and_saved_tensors_may_not(backend):
    group = make()
    x, lists = group.leaves()
    ys = group.ys(backend, x, lists)
    expected = torch.autograd.grad(ys, x, [2 * p.dy for p in group.parts], retain_graph=True)[0]
    assert all(y.is_contiguous() for y in ys)
    for y in ys:
        y += 1
        y *= 2
    got = torch.autograd.grad(ys, x, [p.dy for p in group.parts], retain_graph=True)[0]
    assert torch.equal(got, expected)
    with torch.no_grad():
        lists[1][2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ys, x, [p.dy for p in group.parts])


def test_no_result_shares_memory(backend):
    """Even with nothing to add: empty gradients and equal dys must not become one tensor."""
    group = make((6, 10, [(5, 0), (5, 2)]))
    got, dx = Group([replace(p, dy=group.parts[0].dy) for p in group.parts]).run(backend)
    results = [dx, *(t for one in got for t in one.values() if t.numel())]
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


def test_meta_tensors_and_modes_without_grad(backend):
    group = make(p=0.3)
    x, lists = group.leaves()
    expected = group.ys(backend, x, lists)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ys = group.ys(backend, x, lists)
        assert all(torch.equal(p, q) for p, q in zip(ys, expected, strict=True))
    meta = make(p=0.3)
    meta = Group([replace(p, weight=p.weight.to("meta")) for p in meta.parts])
    x, lists = x.to("meta"), [[None if t is None else t.to("meta") for t in ts] for ts in lists]
    ys = meta.ys(None, x, lists, seeds=None)
    assert [y.shape for y in ys] == [y.shape for y in expected]


def test_poisoned_memory_never_shows(backend):
    """Every uninitialised output is filled with NaN first: none may survive."""
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ("no_outputs_first", "no_inputs", "grouped_queries"):
            for dtype in (torch.float32, torch.bfloat16):
                got, dx = make(shape, dtype, p=0.3).run(backend)
                assert dx.isfinite().all()
                assert all(t.isfinite().all() for one in got for t in one.values())
    finally:
        torch.use_deterministic_algorithms(False)

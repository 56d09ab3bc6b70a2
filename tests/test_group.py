"""Projections of one input in one call: the bits of separate calls, one dx, nothing unneeded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tolerance
import torch
from group_calls import DTYPES, OWN, SHAPES, Group, assert_like_separate, make
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import composed


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

"""A grouped call as PyTorch sees it: opcheck, compile, checkpoint, autocast, gradcheck."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from group_calls import OWN, Group, make
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

OPS = torch.ops.lora_kernels


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

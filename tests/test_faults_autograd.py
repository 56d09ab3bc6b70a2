"""Faults 26 to 31, 39 and 40 of docs/reliability.md: autograd, autocast, checkpoints, aliases."""

from __future__ import annotations

import problems
import pytest
import torch
from conftest import OPERATORS
from test_ops import OPS, SEED, operands
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.ops import no_transforms

SAVED = {"x": 0, "weight": 1, "lora_a": 2, "lora_b": 3}


@pytest.mark.parametrize("name", SAVED)
def test_fault_26_changing_a_saved_tensor_in_place_is_an_error(backend, name):
    *tensors, dy = operands()
    y = lk.fused_lora_linear(*tensors, backend=backend)
    with torch.no_grad():
        tensors[SAVED[name]].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_fault_27_two_backwards_are_bitwise_equal_and_inputs_unmodified(backend):
    x, w, a, b, bias, dy = operands()
    before = [t.detach().clone() for t in (x, w, a, b, bias, dy, SEED)]
    y = lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.3, seed=SEED, backend=backend)
    first = torch.autograd.grad(y, (x, a, b, bias), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, a, b, bias), dy)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(before, (x, w, a, b, bias, dy, SEED), strict=True))


@pytest.mark.parametrize("operator", OPERATORS)  # test_ops.py differentiates the definition twice
def test_fault_28_double_backward_is_a_clear_error(operator):
    x, w, a, b, _, dy = operands()
    y = lk.fused_lora_linear(x, w, a, b, backend=operator)
    with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
        torch.autograd.grad(y, x, dy, create_graph=True)
    y = OPS.lora_linear(x, w, a, b, None, None, 1.0, 0.0, operator)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y, x, dy, create_graph=True)


# ---- 29: torch.func ------------------------------------------------------------------------------

TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_fault_29_transforms_are_refused_or_right(backend, transform):
    x, w, a, b, bias, _ = (t.detach() for t in operands())

    def one(x):
        return lk.fused_lora_linear(x, w, a, b, bias, backend=backend)

    def group(x):
        return lk.fused_lora_linear_group(x, [w, w], [a, a], [b, b], scalings=1.0, backend=backend)

    if backend == "reference":
        dense = w + b @ a
        want = transform(lambda x: torch.nn.functional.linear(x, dense, bias), x)
        torch.testing.assert_close(transform(one, x), want)
        return
    for f, name in ((one, "fused_lora_linear"), (group, "fused_lora_linear_group")):
        with pytest.raises(NotImplementedError, match=rf"^{name}: torch.func.*backend='reference'"):
            transform(f, x)
    no_transforms()  # nothing is left behind
    assert torch.equal(one(x), one(x))


@pytest.mark.parametrize("operator", OPERATORS)  # PyTorch differentiates the definition
def test_fault_29_forward_mode_is_refused(operator):
    x, w, a, b, _, _ = (t.detach() for t in operands())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            lk.fused_lora_linear(dual, w, a, b, backend=operator)


@pytest.mark.parametrize("call", ["one", "group"])
def test_fault_29_batched_gradients_are_refused_or_right(backend, call):
    """Of is_grads_batched, which maps a backward pass whose forward pass it did not see."""
    x, w, a, b, _, dy = operands()
    kinds = dict(dropout_p=0.3, backend=backend)
    if call == "group":
        y = lk.fused_lora_linear_group(x, [w], [a], [b], scalings=1.0, seeds=[SEED], **kinds)[0]
    else:
        y = lk.fused_lora_linear(x, w, a, b, seed=SEED, **kinds)
    dys = torch.stack([dy, -2 * dy])
    each = [torch.autograd.grad(y, (x, a, b), d, retain_graph=True) for d in dys]
    try:
        found = torch.autograd.grad(y, (x, a, b), dys, is_grads_batched=True)
    except RuntimeError as error:
        assert backend != "reference" and "Batching rule not implemented" in str(error)
        return
    assert all(map(torch.equal, found, map(torch.stack, zip(*each, strict=True))))


# ---- 30, 31: modes -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fault_30_no_grad_and_inference_mode_equal_grad_mode(backend, mode):
    """The same bits and the same draw from the generator, and nothing is saved."""
    x, w, a, b, bias, _ = operands()
    torch.manual_seed(5)
    expected = lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.3, backend=backend)
    state = torch.get_rng_state()
    saved = []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), mode():
        y = lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.3, backend=backend)
    assert torch.equal(y, expected) and not y.requires_grad
    assert torch.equal(torch.get_rng_state(), state) and not saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fault_31_autocast_equals_the_mixed_dtype_call(backend, dtype):
    """Under autocast x, W and bias are cast and A, B keep fp32: gradients are bitwise those of the
    call with x, W and bias cast by hand, wherever backward runs."""
    x, w, a, b, bias, dy = operands()
    cast_x, cast_bias = (t.detach().to(dtype).requires_grad_() for t in (x, bias))
    expected_y = lk.fused_lora_linear(
        cast_x, w.to(dtype), a, b, cast_bias, dropout_p=0.3, seed=SEED, backend=backend
    )
    expected = torch.autograd.grad(expected_y, (cast_x, a, b, cast_bias), dy.to(dtype))
    # Plain autograd under autocast casts what backward multiplies: a matter of the definition's
    # caller.
    for backward_inside in (True, False) if backend != "reference" else (False,):
        with torch.autocast("cpu", dtype=dtype):
            y = lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.3, seed=SEED, backend=backend)
            if backward_inside:
                grads = torch.autograd.grad(y, (x, a, b, bias), dy.to(dtype))
        if not backward_inside:
            grads = torch.autograd.grad(y, (x, a, b, bias), dy.to(dtype))
        assert y.dtype == dtype and torch.equal(y, expected_y)
        assert grads[1].dtype == torch.float32 and grads[0].dtype == torch.float32
        for got, want in zip(grads, expected, strict=True):
            assert torch.equal(got, want.to(got.dtype))


def test_fault_31_autocast_switched_off_inside_autocast(backend):
    *tensors, _ = operands()
    want = lk.fused_lora_linear(*tensors, backend=backend)
    assert want.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(lk.fused_lora_linear(*tensors, backend=backend), want)
        assert lk.fused_lora_linear(*tensors, backend=backend).dtype == torch.bfloat16


def test_fault_31_no_cast_outlives_its_call(backend):
    """Autocast keeps casts of leaves until it ends; an update inside it shows all the same."""
    x, w, a, b, _, _ = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        lk.fused_lora_linear(x, w, a, b, backend=backend)
        a.mul_(-3), w.mul_(2)
        y = lk.fused_lora_linear(x, w, a, b, backend=backend)
        fresh = lk.fused_lora_linear(x, w.clone(), a.clone(), b, backend=backend)
    assert torch.equal(y, fresh)


# ---- 39: activation checkpoints ------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_fault_39_checkpoint_recomputes_with_the_same_mask(backend, reentrant):
    x, w, a, b, bias, dy = operands()

    def f(x):
        return lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.4, backend=backend)

    grads = []
    for run in (f, lambda x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        y = run(x)
        for leaf in (x, a, b, bias):
            leaf.grad = None
        y.backward(dy)
        grads.append([y, *(leaf.grad.clone() for leaf in (x, a, b, bias))])
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_fault_39_a_checkpoint_that_forgets_the_generator_shows(backend, reentrant):
    """Gradients are then of another mask than y, unless the caller passes a seed."""
    x, w, a, b, _, dy = operands()
    for seed in (None, SEED):
        grads = []
        for preserved in (True, False):
            torch.manual_seed(11)
            y = checkpoint(
                lambda x, seed=seed: lk.fused_lora_linear(
                    x, w, a, b, dropout_p=0.4, seed=seed, backend=backend
                ),
                x, use_reentrant=reentrant, preserve_rng_state=preserved,
            )  # fmt: skip
            x.grad = a.grad = None
            y.backward(dy)
            grads.append(torch.cat([x.grad.flatten(), a.grad.flatten()]))
        assert torch.equal(*grads) == (seed is not None)


# ---- 40: operands that share memory --------------------------------------------------------------


def test_fault_40_operands_may_share_memory(backend):
    """x is the weight, B is A transposed: results are those of copies, bit for bit."""
    p = problems.make((24, 24, 24, 5), bias=False, dropout_p=0.2)

    def run(x, weight, a, b):
        x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
        y = lk.fused_lora_linear(x, weight, a, b, dropout_p=0.2, seed=SEED, backend=backend)
        return (y, *torch.autograd.grad(y, (x, a, b), p.dy))

    shared = run(p.weight, p.weight, p.lora_a, p.lora_a.t())
    apart = run(p.weight.clone(), p.weight, p.lora_a, p.lora_a.clone().t())
    assert all(map(torch.equal, shared, apart))


def test_fault_40_a_tied_adapter_gets_both_gradients(backend):
    p = problems.make((24, 24, 24, 5), bias=False)
    tied = p.lora_a.clone().requires_grad_()
    first, second = (p.lora_a.clone().requires_grad_() for _ in range(2))
    for a, b in ((tied, tied), (first, second)):
        lk.fused_lora_linear(p.x, p.weight, a, b.t(), backend=backend).backward(p.dy)
    torch.testing.assert_close(tied.grad, first.grad + second.grad)

"""The operators as PyTorch sees them: opcheck, compile, autocast, aliases, saved tensors, FLOPs."""

from __future__ import annotations

import problems
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk

OPS = torch.ops.lora_kernels
COMPILED_BACKENDS = ["cpu", "composed", "reference"]
SEED = torch.tensor([21, 4])
THRESHOLD = 3000


def operands(dtype=torch.float32, adapter_dtype=None, lead=(3, 5), grad=True):
    p = problems.make((15, 12, 20, 4), dtype, adapter_dtype=adapter_dtype, lead=lead)
    leaves = [t.requires_grad_(grad) for t in (p.x, p.lora_a, p.lora_b, p.bias)]
    return leaves[0], p.weight, *leaves[1:], p.dy


def sample_calls():
    x, w, a, b, bias, dy = operands()
    x2, a0, b0 = x.detach().view(15, 20), a.detach(), b.detach()
    h = x2 @ a0.t()
    rows = (x2, w, a0, b0)
    wide = (True, False, True, True, True, True)
    low = [t.detach().bfloat16() for t in (dy, x, w, a0, b0, h)]
    return {
        "dropout_mask": (OPS.dropout_mask, (SEED, 7, 9, THRESHOLD)),
        "down_proj": (OPS.down_proj, (x2, a0, SEED, THRESHOLD, 0.5)),
        "fused_gemm": (OPS.fused_gemm, (x.detach(), w, h, b0, bias.detach(), None, 0, 0.5)),
        "fused_gemm_dx": (OPS.fused_gemm, (dy, w.t(), h, a0.t(), None, SEED, THRESHOLD, 0.5)),
        "weight_grad": (OPS.weight_grad, (h, x2, SEED, THRESHOLD, 0.5, False, True)),
        "forward": (OPS.forward, (x.detach(), *rows[1:], bias.detach(), SEED, THRESHOLD, 0.5, 2.0)),
        "backward": (
            OPS.backward,
            (
                dy,
                x.detach(),
                *rows[1:],
                h,
                SEED,
                THRESHOLD,
                0.5,
                2.0,
                *wide[1:2],
                *wide[1:2],
                *wide[2:],
            ),
        ),
        "weight_grad_wide": (OPS.weight_grad, (low[5], low[1], None, 0, 0.5, True, False)),
        "backward_wide": (OPS.backward, (*low, None, 0, 0.5, 2.0, *wide)),
        "lora_linear_backward_wide": (
            OPS.lora_linear_backward,
            (*low[:3], a0, b0, low[5], None, 0.5, 0.0, "", *[True] * 4),
        ),
        "lora_linear": (OPS.lora_linear, (x, w, a, b, bias, SEED, 0.5, 0.2, "")),
        "lora_linear_plain": (OPS.lora_linear, (x, w, a, b, None, None, 0.5, 0.0, "composed")),
        "lora_linear_off": (OPS.lora_linear, (x, w, a, b, None, None, 0.0, 0.0, "")),
        "lora_linear_backward": (
            OPS.lora_linear_backward,
            (dy, x.detach(), *rows[1:], h, SEED, 0.5, 0.2, "", True, False, True, False),
        ),
        "lora_linear_backward_composed": (
            OPS.lora_linear_backward,
            (dy, x.detach(), *rows[1:], h, SEED, 0.5, 0.2, "composed", False, True, True, False),
        ),
        "lora_linear_backward_off": (
            OPS.lora_linear_backward,
            (
                dy,
                x.detach(),
                w,
                a0.t().contiguous().t(),
                b0,
                h,
                None,
                0.0,
                0.0,
                "",
                True,
                True,
                True,
                True,
            ),
        ),
    }


@pytest.mark.parametrize("name", sample_calls())
def test_fault_32_opcheck(name):
    op, args = sample_calls()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", COMPILED_BACKENDS)
def test_fault_32_compiled_equals_eager(name, p):
    """fullgraph, dynamic shapes, backward and dropout with an explicit seed: the same bits."""

    def step(x, w, a, b, bias):
        y = lk.fused_lora_linear(
            x, w, a, b, bias, scaling=0.5, dropout_p=p, seed=SEED, backend=name
        )
        return y.sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lead in ((3, 5), (4, 2), (7,)):
        x, w, a, b, bias, dy = operands(lead=lead)
        results = []
        for f in (step, compiled):
            y = f(x, w, a, b, bias)
            results.append((y, *torch.autograd.grad(y, (x, a, b, bias), dy)))
        for eager, other in zip(*results, strict=True):
            if name == "reference":  # traced into, so the compiler may reassociate
                torch.testing.assert_close(eager, other)
            else:
                assert torch.equal(eager, other)


def test_inductor_and_drawn_seed():
    """The default compiler, with the seed drawn inside the graph: q of the elements survive."""

    def f(x, w, a, b):
        return lk.fused_lora_linear(x, w, a, b, dropout_p=0.25)

    compiled = torch.compile(f, fullgraph=True)
    x, w = torch.ones(64, 256), torch.zeros(1, 256)
    a, b = torch.ones(1, 256), torch.ones(1, 1)
    y = compiled(x, w, a, b)
    kept = y * lk.keep_probability(0.25) / 256
    assert abs(kept.mean().item() - 0.75) < 0.02
    assert not torch.equal(y, compiled(x, w, a, b)), "every call must draw a mask of its own"


def test_output_may_be_modified_in_place(backend):
    x, w, a, b, bias, dy = operands()
    y = lk.fused_lora_linear(x, w, a, b, bias, backend=backend)
    expected = torch.autograd.grad(y, x, 2 * dy, retain_graph=True)[0]
    assert y.is_contiguous()
    y += 1
    y[0] *= 1
    y *= 2
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


def test_outputs_never_alias(backend):
    """With nothing to add (r = 0, K = 0, no bias) a shortcut could return an input."""
    for k, r in ((20, 0), (0, 4)):
        p = problems.make((6, 12, k, r), bias=False)
        got = p.run(backend)
        storages = {
            t.untyped_storage().data_ptr() for t in (p.x, p.weight, p.lora_a, p.lora_b, p.dy)
        }
        for t in got.values():
            assert t.numel() == 0 or t.untyped_storage().data_ptr() not in storages


def test_autocast_casts_each_operand_once():
    """A second cast of the weight would cost N·K elements in every call."""
    x, w, a, b, bias, _ = operands()
    with (
        torch.profiler.profile() as profile,
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        lk.fused_lora_linear(x, w, a, b, bias, backend="composed")
    casts = [e.count for e in profile.key_averages() if e.key == "aten::_to_copy"]
    assert casts == [5]  # x, weight, bias, A, B


def test_16bit_adapters_of_another_dtype_under_autocast():
    x, w, a, b, _, _ = (t.detach().bfloat16() for t in operands())
    for extra in ({}, {"scaling": 1}):
        with (
            torch.autocast("cpu", dtype=torch.float16),
            pytest.raises(ValueError, match="lora_a must"),
        ):
            lk.fused_lora_linear(x, w, a, b, **extra)


def test_fault_33_nothing_is_read_on_the_host():
    """Meta tensors have no values: a capture would fail where these do."""
    x, w, a, b, bias, dy = (t.detach().to("meta") for t in operands())
    y = lk.fused_lora_linear(x.requires_grad_(), w, a, b, bias, dropout_p=0.1)
    assert y.shape == dy.shape and torch.autograd.grad(y, x, dy)[0].shape == x.shape


def test_autocast_of_the_operator():
    x, w, a, b, bias, dy = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = OPS.lora_linear(x, w, a, b, bias, SEED, 1.0, 0.3, "")[0]
        assert torch.equal(y, lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.3, seed=SEED))
        double = lk.fused_lora_linear(*(t.double() for t in (x, w, a, b)))
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    y.backward(dy.bfloat16())
    assert a.grad.dtype == torch.float32


def test_what_is_saved_for_backward(backend):
    """x, weight, A, B, h, seed and nothing else: no mask, no dropped x, no cast of a weight."""
    if backend == "reference":
        pytest.skip("the definition saves what autograd saves")
    x, w, a, b, bias, _ = operands()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lk.fused_lora_linear(x, w, a, b, bias, dropout_p=0.3, seed=SEED, backend=backend)
    h_bytes, known = 15 * 4 * 4, {t.data_ptr() for t in (x, w, a, b, SEED)}
    extra = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.nbytes for t in extra) == h_bytes and len(saved) == 6


def test_fp32_weight_is_saved_uncast_under_autocast():
    x, w, a, b, _, _ = operands()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        lk.fused_lora_linear(x, w, a, b)
    assert any(t.data_ptr() == w.data_ptr() for t in saved)
    assert not any(t.shape == w.shape and t.dtype == torch.bfloat16 for t in saved)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("op", [lk.fused_lora_linear, None], ids=["eager", "op"])
def test_where_no_gradient_arrives_none_is_computed(op):
    x, w, a, b, bias, _ = operands()
    if op is None:
        y, h = OPS.lora_linear(x, w, a, b, bias, None, 1.0, 0.0, "")
        assert not h.requires_grad
    else:
        y = op(x, w, a, b, bias)
    y = NoGradient.apply(y)
    assert torch.autograd.grad(y.sum(), (x, a, b, bias), allow_unused=True) == (None,) * 4


def test_the_definition_gives_the_weight_no_gradient():
    x, w, a, b, _, dy = operands()
    y = lk.reference.lora_linear(x, w.requires_grad_(), a, b)
    assert torch.autograd.grad(y, (x, w), dy, allow_unused=True)[1] is None


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_definition_under_autocast_is_its_backends(p):
    """Called by itself, it casts what the op has cast before it comes there."""
    x, w, a, b, bias, _ = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lk.reference.lora_linear(x, w, a, b, bias, dropout_p=p, seed=SEED)
        same = lk.fused_lora_linear(x, w, a, b, bias, dropout_p=p, seed=SEED, backend="reference")
    assert y.dtype == torch.bfloat16 and torch.equal(y, same)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["composed", "reference"])
def test_gradcheck(name, p):
    """Our formula in fp64 (composed) and the definition itself, with strided upstream gradients."""
    x, w, a, b, bias, _ = operands(torch.float64)

    def f(x, a, b, bias):
        y = lk.fused_lora_linear(
            x, w, a, b, bias, scaling=1.5, dropout_p=p, seed=SEED, backend=name
        )
        return y.transpose(0, 1)

    assert torch.autograd.gradcheck(f, (x, a, b, bias), nondet_tol=0.0)
    if name == "reference":
        assert torch.autograd.gradgradcheck(f, (x, a, b, bias), nondet_tol=0.0)


def test_fault_06_float64_takes_the_reference():
    x, w, a, b, bias, _ = operands(torch.float64)
    assert torch.equal(
        lk.fused_lora_linear(x, w, a, b, bias), lk.reference.lora_linear(x, w, a, b, bias)
    )


def test_flops():
    """2 per multiply-add of the frozen GEMMs and the rank-r ones, in eager mode and as one op."""
    x, w, a, b, bias, dy = operands()
    m, n, k, r = 15, 12, 20, 4
    forward = 2 * m * (n * k + r * (k + n))
    backward = 2 * m * (n * k + r * (n + k)) + 2 * m * r * (n + k)
    with FlopCounterMode(display=False) as counter:
        y = lk.fused_lora_linear(x, w, a, b, bias)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    assert counter.get_total_flops() == backward
    with FlopCounterMode(display=False) as counter:
        OPS.lora_linear(x, w, a, b, bias, None, 1.0, 0.0, "")[0].backward(dy)
    assert counter.get_total_flops() == forward + backward


def test_poisoned_memory_never_shows(backend):
    """Every uninitialised output is filled with NaN first: none may survive."""
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((33, 47, 65, 7), (260, 140, 330, 16)):
            got = problems.make(shape, torch.bfloat16, dropout_p=0.3).run(backend)
            assert all(t.isfinite().all() for t in got.values())
    finally:
        torch.use_deterministic_algorithms(False)

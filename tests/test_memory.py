"""Memory: what is saved for backward, to the byte, what outlives its last use, and growth."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import itertools
import sys
import weakref
from pathlib import Path

import problems
import pytest
import torch
from conftest import OPERATORS, USABLE
from group_calls import make as make_group
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.bench_memory import saved_bytes

OPS = torch.ops.lora_kernels
M, N, K, R = 24, 40, 32, 4
SEED_BYTES = 16
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16_fp32": (torch.bfloat16, torch.float32),
    "fp16_fp32": (torch.float16, torch.float32),
}
NEEDS = [n for n in itertools.product((False, True), repeat=3) if any(n)]  # x, A, B


def leaves(dtype=torch.float32, adapter_dtype=None, needs=(True,) * 3, p=0.3):
    """A problem and its x, A and B, which require grad by `needs`; its bias never does."""
    problem = problems.make((M, N, K, R), dtype, adapter_dtype=adapter_dtype, dropout_p=p)
    operands = (problem.x, problem.lora_a, problem.lora_b)
    return problem, [t.requires_grad_(need) for t, need in zip(operands, needs, strict=True)]


# ---- saved for backward --------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, adapter", DTYPES.values(), ids=DTYPES)
def test_a_call_saves_h_and_the_seed_and_nothing_else_that_is_new(operator, dtype, adapter, p):
    problem, (x, a, b) = leaves(dtype, adapter, p=p)
    known = (x, problem.weight, a, b)

    def call():
        return lk.fused_lora_linear(
            x, problem.weight, a, b, problem.bias, dropout_p=p, backend=operator
        )

    assert saved_bytes(call, known) == M * R * dtype.itemsize + (SEED_BYTES if p else 0)
    assert saved_bytes(call, known[1:]) == x.nbytes + saved_bytes(call, known)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("needs", NEEDS, ids=lambda n: "".join(itertools.compress("xab", n)))
def test_x_is_saved_only_where_lora_a_is_trained(operator, needs):
    """As in LoRA-FA, whose layers then keep no activation that is as wide as x."""
    name, want = operator, M * R * 4 + (M * K * 4 if needs[1] else 0)
    full, inputs = leaves()
    full_grads = torch.autograd.grad(call(full, *inputs, name), inputs, full.dy)
    problem, (x, a, b) = leaves(needs=needs)
    for run in (call, call_op):
        known = (problem.weight, a, b, problem.seed)
        forward = functools.partial(run, problem, x, a, b, name)
        assert saved_bytes(forward, known) == want
        y = forward()
        wanted = [t for t in (x, a, b) if t.requires_grad]
        grads = torch.autograd.grad(y, wanted, problem.dy)
        kept = [g for g, need in zip(full_grads, needs, strict=True) if need]
        assert all(torch.equal(got, g) for got, g in zip(grads, kept, strict=True))


def call(problem, x, a, b, name):
    return lk.fused_lora_linear(
        x, problem.weight, a, b, problem.bias, dropout_p=0.3, seed=problem.seed, backend=name
    )


def call_op(problem, x, a, b, name):
    return OPS.lora_linear(x, problem.weight, a, b, problem.bias, problem.seed, 1.0, 0.3, name)[0]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_group_saves_x_only_where_a_lora_a_is_trained(operator):
    group = make_group(p=0.3)
    x, (lora_as, lora_bs, biases) = group.leaves()
    weights, seeds = ([getattr(p, n) for p in group.parts] for n in ("weight", "seed"))
    known = (x, *weights, *lora_as, *lora_bs, *seeds)
    h = sum(x.shape[0] * a.shape[0] * 4 for a in lora_as)

    def run():
        return group.ys(operator, x, [lora_as, lora_bs, biases])

    def run_op():
        flat = [x.new_empty(0) if b is None else b for b in biases]
        scalings = [p.scaling for p in group.parts]
        args = (x, weights, lora_as, lora_bs, flat, seeds, scalings, 0.3, operator)
        return OPS.lora_linear_group(*args)[0]

    dys = [p.dy for p in group.parts]
    full = torch.autograd.grad(run(), (x, *lora_bs), dys)
    for trained in ([True, False, False], [False] * 3):
        for a, need in zip(lora_as, trained, strict=True):
            a.requires_grad_(need)
        for call in (run, run_op):
            assert saved_bytes(call, known) == h
            assert saved_bytes(call, known[1:]) == h + (x.nbytes if any(trained) else 0)
            grads = torch.autograd.grad(call(), (x, *lora_bs), dys)
            assert all(torch.equal(got, want) for got, want in zip(grads, full, strict=True))
    last = torch.autograd.grad(run()[2], lora_bs[2], dys[2])[0]  # of others no gradient comes
    assert torch.equal(last, full[-1])


@pytest.mark.parametrize("trained", [True, False])
def test_a_compiled_call_saves_the_same(trained):
    problem, (x, a, b) = leaves(needs=(True, trained, True))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    known = (problem.weight, a, b, problem.seed)

    def run():
        return compiled(problem, x, a, b, "composed")

    assert saved_bytes(run, known) == M * R * 4 + (x.nbytes if trained else 0)
    got, want = (
        torch.autograd.grad(y, (x, b), problem.dy)
        for y in (run(), call(problem, x, a, b, "composed"))
    )
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_checkpoint_saves_its_input_alone(operator, trained):
    problem, (x, a, b) = leaves(needs=(True, trained, True))

    def run():
        return checkpoint(call, problem, x, a, b, operator, use_reentrant=False)

    assert saved_bytes(run, (problem.weight, a, b)) == x.nbytes


def modules():
    """Layers of K -> N by name, made anew."""
    found = {"LoRALinear": lk.LoRALinear(K, N, R, lora_dropout=0.3)}
    if importlib.util.find_spec("peft") is not None:
        import peft_layers

        base = torch.nn.Linear(K, N)
        found["peft"] = peft_layers.make(base, r=R, lora_dropout=0.3)
    return found


@pytest.mark.parametrize("name", modules())
def test_a_module_saves_what_the_call_does(name):
    module, x = modules()[name], torch.randn(M, K, requires_grad=True)
    parameters = dict(module.named_parameters())
    for trained in (True, False):
        for label, parameter in parameters.items():
            if "lora_a" in label.lower():
                parameter.requires_grad_(trained)
        known = (x, *parameters.values())
        assert saved_bytes(lambda: module(x), known) == M * R * 4 + SEED_BYTES
        assert saved_bytes(lambda: module(x), known[1:]) == (
            M * R * 4 + SEED_BYTES + (x.nbytes if trained else 0)
        )


# ---- lifetimes and growth ------------------------------------------------------------------------


def call_step(backend):
    problem, inputs = leaves()
    y = call(problem, *inputs, backend)
    return [*inputs, y], [y]


def group_step(backend):
    group = make_group((M, K, [(N, R), (8, 3)]), p=0.3)
    x, lists = group.leaves()
    ys = group.ys(backend, x, lists)
    return [x, *lists[0], *lists[1], *ys], ys


def module_step(backend, name="LoRALinear"):
    x, module = torch.randn(M, K, requires_grad=True), modules()[name]
    with lk.use_backend(backend):
        y = module(x)
    return [x, y, module, *module.parameters()], [y]


def peft_step(backend):
    pytest.importorskip("peft")
    return module_step(backend, "peft")


def operator_step(backend):
    problem, inputs = leaves()
    y = call_op(problem, *inputs, backend)
    return [*inputs, y], [y]


STEPS = [(step, n) for step in (call_step, group_step, module_step, peft_step) for n in USABLE]
STEPS += [(operator_step, name) for name in OPERATORS]


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward_alone"])
@pytest.mark.parametrize("step, name", STEPS)
def test_everything_dies_with_its_last_name(step, name, backward):
    """Without the garbage collector: inputs, outputs, parameters, gradients and modules."""
    step(name)  # imports and caches
    gc.disable()
    try:
        objects, outputs = step(name)
        if backward:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            objects += [o.grad for o in objects if isinstance(o, torch.Tensor) and o.is_leaf]
        watched = [weakref.ref(o) for o in objects if o is not None]
        del objects, outputs
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


class MallInfo2(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def bytes_in_use() -> int:
    """Of the C heap, which is where tensors, nodes of autograd and C++ containers lie."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    hblkhd, uordblks = mallinfo2().numbers[4], mallinfo2().numbers[7]  # mapped, and in the heap
    return hblkhd + uordblks


def growth(run, iterations: int) -> tuple[int, int]:
    """What `iterations` runs leave behind after a tenth of them: (bytes of the C heap, blocks of
    Python's)."""
    for _ in range(iterations // 10):
        run()
    gc.collect()
    before = bytes_in_use(), sys.getallocatedblocks()
    for _ in range(iterations):
        run()
    gc.collect()
    return bytes_in_use() - before[0], sys.getallocatedblocks() - before[1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("step, name", [
    (call_step, "cpu"), (call_step, "composed"),
    *(pytest.param(group_step, n, marks=pytest.mark.slow) for n in ("cpu", "composed")),
])  # fmt: skip
def test_a_thousand_steps_leave_nothing_behind(step, name):
    def run():
        outputs = step(name)[1]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    heap, blocks = growth(run, 1000)
    assert heap < 16_000 and blocks < 500  # a leak is at least 16 bytes, or a block, a step


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton", "composed"])
def test_a_thousand_steps_leave_nothing_on_the_gpu(name):
    if lk.backends()[name] is not None:
        pytest.skip(lk.backends()[name])
    problem = problems.on_device(problems.make((M, N, K, R), torch.bfloat16, dropout_p=0.3))
    x, a, b = (t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b))
    allocated = []
    for _ in range(1000):
        torch.autograd.grad(call(problem, x, a, b, name), (x, a, b), problem.dy)
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[-1] == allocated[10]  # after the first few, which make workspaces of cuBLAS

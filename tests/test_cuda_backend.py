"""Backend `cuda` on a device: the kernels there are, the vendor's GEMMs for the rest."""

from __future__ import annotations

import re

import pytest
import torch
from problems import SHAPES, check_rows_past_2_31_elements, make, make_exact, on_device
from problems import run_on_device as run
from tolerance import assert_c1, assert_c2, assert_c4

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels.schemas import KERNELS, on_hopper

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def test_the_summary_names_who_serves_what():
    assert all(name in backends._CUDA_SUMMARY for name in KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "composed"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(shape, dtype, p, name):
    problem = make(shape, dtype, dropout_p=p)
    got = run(problem, name)
    assert_c1(problem, got, eager_like=name == "composed")
    assert_c2(problem, got, eager_like=name == "composed")


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_float32_adapters(p):
    problem = make((200, 136, 264, 16), torch.bfloat16, adapter_dtype=torch.float32, dropout_p=p)
    got = run(problem, "cuda")
    assert got["lora_a"].dtype == got["lora_b"].dtype == torch.float32
    assert_c1(problem, got)


@pytest.mark.gpu
def test_exact_problems():
    for seed in range(4):
        problem = make_exact((128, 64, 128, 16), torch.bfloat16, seed)
        assert_c4(problem, run(problem, "cuda"))


@pytest.mark.gpu
def test_fault_34_same_bits_on_every_stream():
    """Of our kernel: the vendor's GEMMs have conditions of their own."""
    p = on_device(make((2000, 128, 512, 16), torch.bfloat16, dropout_p=0.1))
    call = (p.x, p.lora_a, p.seed, 1638, 1.7)
    first = torch.ops.lora_kernels.down_proj(*call)
    for _ in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = torch.ops.lora_kernels.down_proj(*call)
        stream.synchronize()
        assert torch.equal(first, again)


@pytest.mark.gpu
def test_fault_33_graph_capture():
    """Nothing synchronises with the host, and a replay computes the same."""
    p = on_device(make((2000, 128, 512, 16), torch.bfloat16))
    call = (p.x, p.weight, p.lora_a, p.lora_b, p.bias)
    expected = lk.fused_lora_linear(*call, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lk.fused_lora_linear(*call, backend="cuda")
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_the_choice_is_visible():
    x = torch.zeros(4096, 1024, device="cuda", dtype=torch.bfloat16)
    w, a, b = x[:512], x[:16], x[:512, :16]
    found = lk.explain(x, w, a, b, dropout_p=0.1)
    why = found.passed_over.get("cuda", found.reason)
    assert "evidence" in why or "measured" in why
    forced = lk.explain(x, w, a, b, dropout_p=0.1, backend="cuda")
    assert re.search(r"(fused_gemm|down_proj)_sm\d0 \d+x\d+x\d+, \d+ stages, \d+ ", forced.plan)


@pytest.mark.gpu
def test_float32_is_refused_with_the_remedy():
    x = torch.zeros(8, 8, device="cuda")
    with pytest.raises(RuntimeError, match="cannot serve this call"):
        lk.fused_lora_linear(x, x, x, x, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='composed'"):
        torch.ops.lora_kernels.down_proj(x, x, None, 0, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_gradient_that_does_not_flatten(p):
    """dy is permuted, so the op makes rows of it: they must live as long as it needs them."""
    problem = on_device(make((0, 128, 128, 16), torch.bfloat16, dropout_p=p, lead=(7, 60)))
    grads = {}
    for name in ("cuda", "composed"):
        x = problem.x.clone().requires_grad_()
        y = lk.fused_lora_linear(
            x, problem.weight, problem.lora_a, problem.lora_b, dropout_p=p, seed=problem.seed,
            backend=name,
        )  # fmt: skip
        (grads[name],) = torch.autograd.grad(y.transpose(0, 1), x, problem.dy.transpose(0, 1))
    error = (grads["cuda"].double() - grads["composed"].double()).norm()
    assert error <= 1e-2 * grads["composed"].double().norm()


@pytest.mark.gpu
def test_fault_20_rows_past_2_31_elements():
    check_rows_past_2_31_elements("cuda", 2056)


@pytest.mark.gpu
def test_fault_20_weight_past_2_31_elements():
    """y and dx of the last columns: those of a weight of these columns alone."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    n, k, r = (1 << 20) + 300, 2056, 16
    g = torch.Generator("cuda").manual_seed(1)
    w, x, a, b, dy = (
        torch.randn(*s, generator=g, device="cuda", dtype=torch.bfloat16) / s[1] ** 0.5
        for s in ((n, k), (64, k), (r, k), (n, r), (64, n))
    )
    dy[:, :-64] = 0
    found = []
    for weight, up, grad, name in ((w, b, dy, "cuda"), (w[-64:], b[-64:], dy[:, -64:], "composed")):
        leaf = x.clone().requires_grad_()
        y = lk.fused_lora_linear(leaf, weight, a, up, backend=name)
        (dx,) = torch.autograd.grad(y, leaf, grad)
        found.append((y[:, -64:].double(), dx.double()))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.gpu
def test_requests_that_no_kernel_serves_say_so():
    if not on_hopper(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    x = torch.zeros(256, 64, device="cuda", dtype=torch.bfloat16)
    a, b = torch.zeros(200, 64, device="cuda", dtype=x.dtype), x.new_zeros(128, 200)

    def call(form="", tile_n=0, group=0, x=x, b=b):
        return torch.ops.lora_kernels.forward_as(
            x, x[:128], a, b, None, None, 0, 1.0, 1.0, form, tile_n, group
        )

    for arguments, message in [
        (dict(form="three"), "form is 'three'; expected one_launch, two_launches"),
        (dict(tile_n=100), "tile_n is 100; expected 128, 192, 256"),
        (dict(group=-1), "group is -1"),
        (dict(form="one_launch"), "r is more than 128; take form='two_launches'"),
        (dict(b=b.half()), "up has dtype float16 but must have that of x, bfloat16"),
        (dict(x=x.float()), "backend='composed'"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call(**arguments)
    y, h = call()
    assert y.shape == (256, 128) and h.shape == (256, 200)

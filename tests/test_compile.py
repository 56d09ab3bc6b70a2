"""torch.compile, export and CUDA graphs, of the op and of PEFT models through it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")

LLAMA = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fails_on_recompile(after: int, call: int):
    """From call number `after` on a compilation is an error."""
    return torch.compiler.set_stance("fail_on_recompile" if call >= after else "default")


def operands(m, r, k=24, n=20):
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    lora_a, lora_b = torch.randn(r, k), torch.randn(n, r)
    return x.requires_grad_(), weight, lora_a.requires_grad_(), lora_b.requires_grad_(), bias


def test_no_recompile_by_rows_rank_or_scaling():
    compiled = torch.compile(
        lk.fused_lora_linear, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for i in range(20):
        args, scaling = operands(3 + i, 2 + i % 7), 0.5 + 0.3 * i
        with fails_on_recompile(1, i):
            y = compiled(*args, scaling=scaling)
        grads = torch.autograd.grad(y.square().sum(), [args[0], args[2], args[3]])
        want = lk.fused_lora_linear(*args, scaling=scaling)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        wanted = torch.autograd.grad(want.square().sum(), [args[0], args[2], args[3]])
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-2)


def test_scaling_that_changes_compiles_at_most_once_more():
    """Without dynamic=True the first value is a constant, the second makes it an input."""
    compiled = torch.compile(lk.fused_lora_linear, backend="aot_eager", fullgraph=True)
    args = operands(5, 4)
    for i in range(20):
        with fails_on_recompile(2, i):
            y = compiled(*args, scaling=1.0 + i / 8)
        want = lk.fused_lora_linear(*args, scaling=1.0 + i / 8)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def llama(**config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return with_lora(LlamaForCausalLM(LlamaConfig(**LLAMA)), **config)


def with_lora(model, **config) -> nn.Module:
    names = [name.split(".")[-1] for name, m in model.named_modules() if type(m) is nn.Linear]
    targets = sorted(set(names) - {"lm_head"})
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **config)
    return lk.apply(peft.get_peft_model(model, config))


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


def loss_and_grads(model, run, ids):
    model.zero_grad()
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * len(lora_layers(model))
    return loss.detach(), grads


def net(**config) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
    return with_lora(layers, **config)


def y_and_grads(model, run, x):
    model.zero_grad()
    y = run(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_peft_model_is_one_graph_for_any_scaling_and_batch():
    model = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for i in range(20):
        for layer in lora_layers(model):
            layer.set_scale("default", 0.5 + i / 10)
        x = torch.randn(2 + i % 3, 6 + i, 24)
        with fails_on_recompile(1, i):
            got = y_and_grads(model, compiled, x)
        torch.testing.assert_close(got, y_and_grads(model, model, x), rtol=1e-4, atol=1e-4)


def test_scaling_that_is_a_tensor_is_an_input():
    """As after prepare_model_for_compiled_hotswap."""
    model, ids = llama(), torch.randint(0, 64, (2, 6))
    for layer in lora_layers(model):
        layer.scaling["default"] = torch.tensor(1.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for i in range(5):
        for layer in lora_layers(model):
            layer.scaling["default"].fill_(0.5 + i)
        with fails_on_recompile(1, i):
            got = compiled(input_ids=ids).logits
        torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_dropout_in_a_graph_draws_anew():
    model, ids = llama(lora_dropout=0.5), torch.randint(0, 64, (2, 6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    first, second = (loss_and_grads(model, compiled, ids) for _ in range(2))
    assert first[0] != second[0]
    torch.manual_seed(3)
    torch.testing.assert_close(loss_and_grads(model, compiled, ids), first, rtol=0, atol=0)
    torch.manual_seed(3)
    eager = loss_and_grads(model, model, ids)
    torch.testing.assert_close(first, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype):
    model, x = net().to(dtype), torch.randn(6, 24, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(y_and_grads(model, compiled, x), y_and_grads(model, model, x))


def test_export():
    model = llama().eval()
    rows = torch.export.Dim("rows", min=2, max=512)
    layer = lora_layers(model)[0]
    exported = torch.export.export(layer, (torch.randn(4, 32),), dynamic_shapes=({0: rows},))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "lora_kernels.lora_linear.default" in targets
    for m in (2, 9):
        x = torch.randn(m, 32)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.slow
def test_ahead_of_time_package(tmp_path):
    """A package of AOTInductor calls the operator: it runs where this package is imported."""
    layer = lora_layers(llama().eval())[0]
    rows = torch.export.Dim("rows", min=1, max=512)
    exported = torch.export.export(layer, (torch.randn(4, 32),), dynamic_shapes=({0: rows},))
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "layer.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    for m in (1, 2, 9):
        x = torch.randn(m, 32)
        torch.testing.assert_close(run(x), layer(x))


def test_fallback_in_a_graph():
    model = llama()
    lora_layers(model)[0].merge()
    plain, ids = lk.unapply(copy.deepcopy(model)), torch.randint(0, 64, (2, 6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_fault_33_cuda_graph_of_a_peft_layer(p):
    """Nothing waits for the device; a replay reads scaling of a tensor anew and draws anew."""
    layer = nn.Sequential(nn.Linear(64, 96, device="cuda", dtype=torch.bfloat16))
    config = peft.LoraConfig(r=8, target_modules=["0"], lora_dropout=p, init_lora_weights=False)
    layer = lk.apply(peft.inject_adapter_in_model(config, layer))[0]
    layer.scaling["default"] = torch.tensor(2.0, device="cuda")
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(128, 96, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.cuda.graph(graph):
        y = layer(x)
        grads = torch.autograd.grad(y, leaves, dy)
    found = []
    for _ in range(2):
        graph.replay()
        found.append([t.clone() for t in (y, *grads)])
    if p == 0:
        torch.testing.assert_close(*found, rtol=0, atol=0)
        want = layer(x)
        torch.testing.assert_close(found[0][0], want, rtol=0, atol=0)
        torch.testing.assert_close(
            found[0][1:], list(torch.autograd.grad(want, leaves, dy)), rtol=0, atol=0
        )
    else:
        assert not torch.equal(found[0][0], found[1][0])
    layer.scaling["default"].zero_()
    graph.replay()
    torch.testing.assert_close(y, layer.base_layer(x), rtol=2e-2, atol=2e-2)

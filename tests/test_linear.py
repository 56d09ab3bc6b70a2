"""LoRALinear: construction, training, merging, saving."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import lora_kernels as lk


def trained(**kwargs):
    torch.manual_seed(0)
    layer = lk.LoRALinear(20, 12, 4, lora_alpha=6, **kwargs)
    nn.init.normal_(layer.lora_b)
    return layer


def test_only_adapters_train():
    layer = lk.LoRALinear(20, 12, 4)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert {n for n, p in layer.named_parameters()} == {"weight", "bias", "lora_a", "lora_b"}
    layer(torch.randn(3, 20)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and layer.lora_b.grad is not None
    layer.merge()
    assert not layer.weight.requires_grad


def test_a_new_layer_equals_the_linear_it_came_from():
    linear = nn.Linear(20, 12)
    layer = lk.LoRALinear.from_linear(linear, 4, lora_dropout=0.5)
    x = torch.randn(5, 20)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight.data_ptr() == linear.weight.data_ptr(), "shared, not copied"
    assert linear.weight.requires_grad, "the original is left alone"
    for mode in (True, False):
        assert lk.LoRALinear.from_linear(linear.train(mode), 4).training == mode


class PackedLinear(nn.Linear):
    """As bitsandbytes' Linear4bit: two weights a byte."""

    def __init__(self):
        super().__init__(20, 12)
        self.weight = nn.Parameter(torch.zeros(120, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("bad", [None, nn.Embedding(12, 20), nn.Conv1d(20, 12, 1), trained()])
def test_from_linear_takes_a_linear_alone(bad):
    """An adapter that another layer has would be lost in silence."""
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, but got"):
        lk.LoRALinear.from_linear(bad, 4)


def test_from_linear_refuses_a_packed_weight():
    with pytest.raises(TypeError, match=r"must be \[12, 20\], but got torch.uint8 \[120, 1\]: it"):
        lk.LoRALinear.from_linear(PackedLinear(), 4)


GOOD_ADAPTER = dict(lora_a=torch.ones(4, 20), lora_b=torch.ones(12, 4), lora_alpha=3.0)
BAD_ADAPTERS = {
    "alpha": (dict(lora_alpha=math.nan), ValueError, "lora_alpha must be finite"),
    "list": (dict(lora_b=[1.0]), TypeError, "set_adapter: lora_b must be a Tensor, but got list"),
    "shape": (dict(lora_b=torch.ones(12, 5)), ValueError, r"lora_b must have shape \[12, 4\], but"),
    "meta": (dict(lora_b=torch.ones(12, 4, device="meta")), NotImplementedError, "meta"),
}


@pytest.mark.parametrize("change, error, said", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_an_adapter_that_is_refused_leaves_the_layer_as_it_was(change, error, said):
    layer, x = trained(), torch.randn(5, 20)
    layer.merge()
    merged = layer(x)
    with pytest.raises(error, match=said):
        layer.set_adapter(**(GOOD_ADAPTER | change))
    assert layer.merged and torch.equal(layer(x), merged)
    layer.unmerge()
    assert torch.equal(layer(x), trained()(x))
    layer.set_adapter(**GOOD_ADAPTER)
    assert not torch.equal(layer(x), trained()(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora):
    layer = lk.LoRALinear(8, 8, 4, lora_alpha=6, use_rslora=rslora)
    assert layer.scaling == 6 / (math.sqrt(4) if rslora else 4)
    assert lk.LoRALinear(8, 8, 4).scaling == 1.0


def test_forward_is_the_op():
    layer, x = trained(lora_dropout=0.5), torch.randn(2, 3, 20)
    layer.eval()
    expected = x @ (layer.weight + layer.scaling * layer.lora_b @ layer.lora_a).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merge_and_exact_unmerge(dtype):
    layer = trained(dtype=dtype, adapter_dtype=torch.float32).eval()
    x = torch.randn(5, 20, dtype=dtype)
    frozen, before = layer.weight.detach().clone(), layer(x)
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    delta = layer.lora_b @ layer.lora_a
    assert torch.equal(
        layer.weight, torch.add(frozen.float(), delta, alpha=layer.scaling).to(dtype)
    ), "added in fp32, rounded once"
    tolerance = dict(rtol=0.03, atol=0.05) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer(x), before, **tolerance)
    merged = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, merged), "merging twice adds once"
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, frozen)
    assert torch.equal(layer(x), before)


def test_merging_between_forward_and_backward_keeps_the_gradient():
    layer, x = trained(), torch.randn(5, 20, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    y = layer(x)
    layer.merge()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_merging_an_adapter_that_is_off():
    layer = lk.LoRALinear(20, 12, 4, lora_alpha=0)
    layer.lora_a.data.fill_(torch.inf)
    frozen = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, frozen)


def test_merging_leaves_the_original_linear_alone():
    linear = nn.Linear(20, 12)
    weight = linear.weight.detach().clone()
    layer = lk.LoRALinear.from_linear(linear, 4)
    nn.init.normal_(layer.lora_b)
    layer.merge()
    assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("saved_merged", [False, True])
@pytest.mark.parametrize("loaded_merged", [False, True])
def test_state_dict_round_trip(saved_merged, loaded_merged):
    """The state dict holds W0 and the adapters, merged or not, and loads into either."""
    source, target = trained(), lk.LoRALinear(20, 12, 4, lora_alpha=6)
    x = torch.randn(5, 20)
    expected = source(x)
    if saved_merged:
        source.merge()
    if loaded_merged:
        target.merge()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    assert set(source.state_dict()) == {"weight", "bias", "lora_a", "lora_b"}
    assert target.merged == loaded_merged
    target.unmerge()
    assert torch.equal(target(x), expected)


def test_state_dict_of_a_merged_layer_is_detached_unless_variables_are_kept():
    layer = trained()
    frozen = layer.weight
    layer.merge()
    assert layer.state_dict(keep_vars=True)["weight"] is frozen
    assert not any(isinstance(t, nn.Parameter) for t in layer.state_dict().values())


def test_a_merged_layer_can_be_moved_and_copied():
    layer = trained()
    layer.merge()
    for other in (copy.deepcopy(layer), layer.double()):
        assert other.merged
        other.unmerge()
        assert other.weight.dtype == other.lora_a.dtype


def test_dtypes_and_devices():
    layer = lk.LoRALinear(20, 12, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    y = layer(torch.randn(3, 20, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_a.grad.dtype == torch.float32
    assert lk.LoRALinear(20, 12, 4, device="meta").lora_b.device.type == "meta"


def test_rank_zero_and_no_bias():
    layer = lk.LoRALinear(20, 12, 0, bias=False)
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    layer.merge()
    layer.unmerge()


def test_inits():
    layer = lk.LoRALinear(512, 12, 64)
    assert layer.lora_b.abs().max() == 0
    bound = math.sqrt(1 / 512)  # Kaiming-uniform with a = sqrt(5)
    assert 0.95 * bound < layer.lora_a.abs().max() <= bound
    layer.reset_lora_parameters("gaussian")
    assert abs(layer.lora_a.std().item() * 64 - 1) < 0.05
    with pytest.raises(ValueError, match="init must be 'kaiming_uniform' or 'gaussian'"):
        layer.reset_lora_parameters("zeros")


@pytest.mark.parametrize(
    "bad", [dict(r=-1), dict(r=4, lora_dropout=1.5), dict(r=4, lora_dropout=-0.1)]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="LoRALinear: "):
        lk.LoRALinear(8, 8, **bad)


def test_training_learns_a_low_rank_update():
    """Ten steps of SGD on a rank-2 target: the loss falls, W0 does not move."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    layer = lk.LoRALinear.from_linear(linear, 4, lora_dropout=0.05)
    target = linear.weight.detach() + torch.randn(16, 2) @ torch.randn(2, 16) * 0.1
    frozen = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW([layer.lora_a, layer.lora_b], lr=0.02)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 16)
        loss = (layer(x) - x @ target.T - linear.bias).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert torch.equal(layer.weight, frozen)

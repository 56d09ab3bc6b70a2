"""PEFT layers through the fused op: what is fused equals PEFT's forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft_layers import (
    PEFTS_OWN,
    K,
    N,
    assert_falls_back,
    assert_fused,
    assert_same,
    make,
    run,
    x_of,
)
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import dropout

# ---- what is fused -------------------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "rank_1": dict(r=1),
    "alpha": dict(lora_alpha=16),
    "rslora": dict(use_rslora=True, lora_alpha=3),
    "negative": dict(lora_alpha=-4),
    "lora_bias": dict(lora_bias=True, lora_alpha=3),
    "dropout_in_eval": dict(lora_dropout=0.4),
}
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no_bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_peft(fused, config, base):
    layer = make(base(), **config)
    if "lora_dropout" in config:
        layer.eval()
    assert_fused(layer, x_of(3, 7, K), fused)


@pytest.mark.parametrize("shape", [(K,), (1, K), (4, K), (2, 3, K), (2, 1, 3, K), (0, K)])
def test_any_leading_dimensions(fused, shape):
    assert_fused(make(), x_of(*shape), fused)


def test_x_of_any_strides(fused):
    x = torch.randn(K, 9).t().requires_grad_()
    assert not x.is_contiguous()
    assert_fused(make(), x, fused)


TRAINED = ["x", "lora_A", "lora_B", "base_layer.bias", "lora_B.default.bias"]


@pytest.mark.parametrize("subset", range(1, 32))
def test_any_subset_of_gradients(fused, subset):
    layer = make(lora_bias=True)
    wanted = [name for i, name in enumerate(TRAINED) if subset >> i & 1]
    for name, p in layer.named_parameters():
        p.requires_grad_(any(name in (w, f"{w}.default.weight") for w in wanted))
    assert_fused(layer, x_of(6, K, grad="x" in wanted), fused)


def test_base_bias_may_be_trained_and_the_base_weight_may_not(fused):
    layer = make()
    layer.base_layer.bias.requires_grad_()
    got = run(layer, x_of(6, K))
    assert "base_layer.bias" in got and "base_layer.weight" not in got and len(fused) == 1
    layer.base_layer.weight.requires_grad_()
    fused.clear()
    assert_falls_back(layer, x_of(6, K), fused)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 2, torch.tensor(0.75), torch.tensor(-3.0)])
def test_scaling_of_the_moment(fused, scaling):
    layer = make(lora_bias=True)
    layer.scaling["default"] = scaling
    assert_fused(layer, x_of(6, K), fused)
    assert type(fused[0]["scaling"]) in (float, int)


def test_scaling_that_is_a_tensor_gets_its_gradient(fused):
    layer, x = make(), x_of(6, K)
    grads = []
    for forward in (PEFTS_OWN, nn.Module.__call__):
        layer.scaling["default"] = torch.tensor(0.75, requires_grad=True)
        forward(layer, x).square().sum().backward()
        grads.append(layer.scaling["default"].grad)
    assert len(fused) == 1
    torch.testing.assert_close(*grads)


def test_scaling_changed_by_peft(fused):
    layer = make(lora_alpha=10)
    for change in (
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.scale_layer(0.5),
        lambda: layer.unscale_layer(),
    ):
        change()
        fused.clear()
        assert_fused(layer, x_of(4, K), fused)


@pytest.mark.parametrize(
    "dtype, adapter",
    [(torch.bfloat16, "fp32"), (torch.bfloat16, "same"), (torch.float16, "same")],
)
def test_16_bit_base(fused, dtype, adapter):
    """No further from the fp64 result than PEFT; gradients in the dtype of their parameter."""
    layer = make(nn.Linear(160, 96), dtype, r=8, lora_bias=True, lora_alpha=16)
    if adapter == "fp32":
        layer.lora_A.float(), layer.lora_B.float()
    x = x_of(64, 160, dtype=dtype)
    torch.manual_seed(3)
    dy = torch.randn(64, 96, dtype=dtype)
    want = run(layer, x, PEFTS_OWN, dy)
    got = run(layer, x, dy=dy)
    assert len(fused) == 1
    exact = run(copy.deepcopy(layer).double(), x.double(), PEFTS_OWN, dy.double())
    assert got.keys() == want.keys() == exact.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        ours, pefts = ((t[name].double() - exact[name]).norm() for t in (got, want))
        # fp32 adapters are rounded to 16 bits once, where PEFT rounds x's products alone.
        bound = 2 * torch.finfo(dtype).eps * exact[name].norm() if adapter == "fp32" else pefts
        assert ours <= max(bound, 1.05 * pefts), name


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(fused, base, x_dtype):
    layer = make(dtype=base)
    layer.lora_A.float(), layer.lora_B.float()
    x = x_of(8, K, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_fused(layer, x, fused, rtol=0.04, atol=0.06)
    assert run_under_autocast(layer, x)["y"].dtype == torch.bfloat16


def test_16_bit_adapters_on_a_float32_base_are_fused_under_autocast(fused):
    layer, x = make(), x_of(8, K)
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    assert_falls_back(layer, x, fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert_fused(layer, x, fused, rtol=0.04, atol=0.06)


def run_under_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return run(layer, x)


def test_output_may_be_modified_in_place(fused):
    layer, x = make(), x_of(4, 3, K)
    y = layer(x)
    y += 1
    y[0] *= 2
    y.sum().backward()
    assert len(fused) == 1 and x.grad is not None


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_is_the_documented_mask(fused):
    """In y and in every gradient, dX included, which PEFT's own tests cannot see."""
    p, x = 0.4, x_of(9, K)
    layer = make(lora_dropout=p, lora_alpha=10)
    torch.manual_seed(11)
    got = run(layer, x)
    torch.manual_seed(11)
    seed = dropout.draw_seed(x.device)
    mask = lk.dropout_mask(seed, x.shape, p)
    assert 0 < mask.sum() < mask.numel()

    class Masked(nn.Dropout):
        def forward(self, x):
            return torch.where(mask, x / lk.keep_probability(p), 0)

    layer.lora_dropout["default"] = Masked(p)
    assert_same(got, run(layer, x))
    assert len(fused) == 1


def test_dropout_statistics(fused):
    layer = make(lora_dropout=0.25, r=K)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(K))
        layer.lora_B["default"].weight.copy_(torch.eye(N, K))
        layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
        layer.scaling["default"] = 1.0
        y = layer(torch.ones(4000, K))
    kept = y != 0
    assert len(fused) == 1
    assert abs(kept.float().mean().item() - 0.75) < 0.01
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75), rtol=1e-4, atol=0)


def test_dropout_follows_the_adapters_own_training_flag(fused):
    layer, x = make(lora_dropout=0.5), x_of(16, K)
    layer.lora_dropout.eval()
    assert layer.training
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    assert fused[0]["dropout_p"] == 0.0
    layer.lora_dropout.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout["default"].p = 0.125
    layer(x)
    assert fused[-1]["dropout_p"] == 0.125


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_mask(fused, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    layer, x = make(lora_dropout=0.5), x_of(16, K)
    torch.manual_seed(5)
    want = run(layer, x)
    torch.manual_seed(5)
    got = run(layer, x, lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant))
    assert len(fused) == 3
    assert_same(got, want, rtol=0, atol=0)

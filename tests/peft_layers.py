"""PEFT layers and models that the tests of `lora_kernels.peft_linear` and `.adopt` share."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from torch import nn

import lora_kernels as lk

K, N = 20, 12
PEFTS_OWN = lora.Linear.forward


def make(base=None, dtype=torch.float32, **config) -> lora.Linear:
    """A layer whose adapter is not zero, applied."""
    torch.manual_seed(0)
    base = nn.Linear(K, N) if base is None else base
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, **{"r": 5, **config})
    model = inject_adapter_in_model(config, nn.Sequential(base.to(dtype)))
    assert type(model[0]) is lora.Linear
    return lk.apply(model)[0]


def run(layer, x, forward=None, dy=None):
    """y, and the gradients of x and of every parameter that gets one, by name."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    layer.zero_grad()
    y = layer(x) if forward is None else forward(layer, x)
    torch.manual_seed(7)
    y.backward(torch.randn_like(y) if dy is None else dy)
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in layer.named_parameters()}
    return {name: t.clone() for name, t in found.items() if t is not None}


def assert_same(got, want, rtol=1e-5, atol=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=name)


def assert_fused(layer, x, calls, **tolerance):
    want = run(layer, x, PEFTS_OWN)
    assert not calls
    got = run(layer, x)
    assert len(calls) == 1
    assert_same(got, want, **tolerance)


def assert_falls_back(layer, x, calls):
    want = run(layer, x, PEFTS_OWN)
    assert_same(run(layer, x), want, rtol=0, atol=0)
    assert not calls


def x_of(*shape, dtype=torch.float32, grad=True):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def add_other(layer):
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(config, nn.Sequential(layer), adapter_name="other")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(self.up(x).relu())


def model_of(**config) -> PeftModel:
    torch.manual_seed(2)
    config = {"r": 4, "init_lora_weights": False, **config}
    return get_peft_model(Net(), LoraConfig(target_modules=["up", "down"], **config))


def add_second(model):
    torch.manual_seed(4)
    model.add_adapter("b", LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))

"""PEFT layers that the fused op does not serve: what they compute is PEFT's own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft_layers import PEFTS_OWN, K, N, add_other, assert_falls_back, make, run, x_of

import lora_kernels as lk


def two_adapters(layer, x):
    add_other(layer)
    layer.set_adapter(["default", "other"])


def disabled(layer, x):
    layer.enable_adapters(False)
    x.requires_grad_()


def merged(layer, x):
    layer.merge()
    x.requires_grad_()


def no_adapter(layer, x):
    layer.delete_adapter("default")
    x.requires_grad_()


def hooked(which):
    def change(layer, x):
        module = {
            "base": layer.base_layer,
            "lora_A": layer.lora_A["default"],
            "lora_B": layer.lora_B["default"],
            "dropout": layer.lora_dropout["default"],
        }[which]
        module.register_forward_hook(lambda module, args, y: y * 1.5)

    return change


def replaced(layer, x):
    module = layer.lora_A["default"]
    module.forward = lambda x: nn.functional.linear(x, module.weight) * 2


def subclass_of_linear(layer, x):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) - 1

    layer.base_layer.__class__ = Own


def tensor_subclass(layer, x):
    class Wrapped(torch.Tensor):
        pass

    weight = layer.base_layer.weight.data.as_subclass(Wrapped)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def wrapped(parameter):
    """The parameter's data as a subclass of Tensor."""
    own = type("Wrapped", (torch.Tensor,), {})
    return nn.Parameter(parameter.data.as_subclass(own), requires_grad=parameter.requires_grad)


def wrap(which):
    def change(layer, x):
        modules = {"lora_A": layer.lora_A["default"], "lora_B": layer.lora_B["default"]}
        module = modules.get(which, layer.base_layer)
        name = "bias" if which == "bias" else "weight"
        setattr(module, name, wrapped(getattr(module, name)))

    return change


def lora_a_with_a_bias(layer, x):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(5))


def other_class_of_lora_a(layer, x):
    layer.lora_A["default"].__class__ = type("Own", (nn.Linear,), {})


def without_casting(layer, x):
    layer.base_layer.bfloat16()
    layer.cast_input_dtype_enabled = False
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    x.data = x.data.bfloat16()


def fp16_with_fp32_adapters(layer, x):
    layer.base_layer.half()
    x.data = x.data.half()


CHANGES = {
    **{f"subclass_of_{w}": wrap(w) for w in ("lora_A", "lora_B", "bias")},
    "lora_a_with_a_bias": lora_a_with_a_bias,
    "other_class_of_lora_a": other_class_of_lora_a,
    "without_casting": without_casting,
    "fp16_with_fp32_adapters": fp16_with_fp32_adapters,
    "forward_pre_hook": lambda layer, x: layer.lora_B["default"].register_forward_pre_hook(
        lambda module, args: (args[0] * 1.5,)
    ),
    "backward_pre_hook": lambda layer, x: layer.lora_A["default"].register_full_backward_pre_hook(
        lambda module, after: (after[0] * 2,)
    ),
    "vector_scaling": lambda layer, x: layer.scaling.update(default=torch.full((N,), 0.5)),
    "two_adapters": two_adapters,
    "disabled": disabled,
    "merged": merged,
    "no_adapter": no_adapter,
    **{f"hook_on_{which}": hooked(which) for which in ("base", "lora_A", "lora_B", "dropout")},
    "backward_hook": lambda layer, x: layer.lora_A["default"].register_full_backward_hook(
        lambda module, before, after: (before[0] * 2,)
    ),
    "forward_replaced": replaced,
    "subclass_of_linear": subclass_of_linear,
    "tensor_subclass": tensor_subclass,
    "parametrized": lambda layer, x: nn.utils.parametrizations.weight_norm(layer.base_layer),
    "trained_weight": lambda layer, x: layer.base_layer.weight.requires_grad_(),
    "other_dropout": lambda layer, x: layer.lora_dropout.update({"default": nn.AlphaDropout(0.0)}),
    "infinite_scaling": lambda layer, x: layer.scaling.update(default=2.0**120),
    "fp64": lambda layer, x: (layer.double(), setattr(x, "data", x.data.double())),
    "half_adapter": lambda layer, x: (
        layer.base_layer.bfloat16(), layer.lora_A.half(), layer.lora_B.half(),
        setattr(x, "data", x.data.bfloat16()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_falls_back(fused, change):
    """Also: a layer that changes after it was applied is looked at anew."""
    layer, x = make(), x_of(6, K)
    run(layer, x)
    assert len(fused) == 1
    fused.clear()
    change(layer, x)
    assert_falls_back(layer, x, fused)
    by_call = {CHANGES["without_casting"], CHANGES["fp16_with_fp32_adapters"]}
    assert bool(lk.report(layer).layers[0].why_not) == (change not in by_call)


def test_falls_back_for_a_variant(fused):
    assert_falls_back(make(use_dora=True), x_of(6, K), fused)


def test_global_hook(fused):
    layer, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        layer(x_of(4, K))
    finally:
        handle.remove()
    assert layer.lora_A["default"] in seen and not fused


CALLS = {
    "subclass": lambda x: wrapped(x),
    "sparse": lambda x: x.detach().to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x.detach()]),
}


@pytest.mark.parametrize("of", CALLS.values(), ids=CALLS)
def test_x_of_another_kind(fused, of):
    layer, x = make().requires_grad_(False), of(x_of(4, K, grad=False))
    try:
        want = PEFTS_OWN(layer, x)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            layer(x)
    else:
        got = layer(x)
        assert type(got) is type(want) and got.is_nested == want.is_nested
    assert not fused


def test_sparse_weight(fused):
    layer, x = make().requires_grad_(False), x_of(4, K, grad=False)
    layer.base_layer.weight = nn.Parameter(
        layer.base_layer.weight.data.to_sparse_csr(), requires_grad=False
    )
    torch.testing.assert_close(layer(x), PEFTS_OWN(layer, x), rtol=0, atol=0)
    assert not fused


def test_forward_of_the_class_replaced(fused, monkeypatch):
    layer, x, own = make(), x_of(4, K), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) * 2)
    torch.testing.assert_close(layer(x), PEFTS_OWN(layer, x), rtol=0, atol=0)
    assert not fused


def test_parameters_that_are_plain_attributes(fused):
    """As FSDP1 and DataParallel hold them."""
    layer, x = make(), x_of(4, K)
    want = layer(x)
    for name in ("weight", "bias"):
        tensor = getattr(layer.base_layer, name).data
        del layer.base_layer._parameters[name]
        setattr(layer.base_layer, name, tensor)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    assert len(fused) == 2


def test_trained_weight_under_reentrant_checkpointing(fused):
    """Computed without grad first and with it then: both by PEFT, or the masks would differ."""
    from torch.utils.checkpoint import checkpoint

    layer, x = make(lora_dropout=0.5), x_of(6, K)
    layer.base_layer.weight.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=True)
    y.sum().backward()
    lora_b = layer.lora_B["default"].weight
    torch.testing.assert_close((y - layer.base_layer(x)).sum(), (lora_b * lora_b.grad).sum())
    assert not fused


def test_adapter_names(fused):
    layer, x = make(), x_of(4, K)
    add_other(layer)
    layer.eval()
    names = ["default", "other", "__base__", "default"]
    with torch.no_grad():
        got = layer(x, adapter_names=names)
        torch.testing.assert_close(got, PEFTS_OWN(layer, x, adapter_names=names), rtol=0, atol=0)
    assert not fused


def test_function_transforms(fused):
    layer, x = make().requires_grad_(False), x_of(4, K, grad=False)
    want = torch.func.vmap(lambda row: PEFTS_OWN(layer, row))(x)
    torch.testing.assert_close(torch.func.vmap(layer)(x), want)
    y, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(tangent, torch.ones_like(x) @ weight.t())
    grads = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(grads, torch.ones_like(y) @ weight)
    assert not fused


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_compiled_transforms(fused, transform):
    layer, x = make().requires_grad_(False), x_of(4, K, grad=False)

    def run_(x):
        if transform == "grad":
            return torch.func.grad(lambda x: layer(x).square().sum())(x)
        return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]

    torch._dynamo.reset()
    got = torch.compile(run_, backend="eager")(x)
    lk.unapply(layer)
    torch.testing.assert_close(got, run_(x))
    assert not fused


def test_forward_mode(fused):
    layer, x = make().requires_grad_(False), x_of(4, K, grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(run_(dual)).tangent
            for run_ in (layer, lambda x: PEFTS_OWN(layer, x))
        ]
    torch.testing.assert_close(*tangents)
    assert not fused


def test_trace(fused):
    layer, x = make().requires_grad_(False), x_of(4, K, grad=False)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(x), layer(x))
    assert len(fused) == 1


@pytest.mark.parametrize("x", [x_of(4, K, dtype=torch.bfloat16), x_of(4, K + 1)])
def test_errors_are_pefts(fused, x):
    layer = make()
    with pytest.raises(RuntimeError) as pefts:
        PEFTS_OWN(layer, x)
    with pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(pefts.value) and not fused

"""PEFT layers through the fused op: what is fused equals PEFT's forward, all else is PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft_layers import PEFTS_OWN, K, N, add_other, assert_same, make, run, x_of
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import dropout


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


# ---- what falls back -----------------------------------------------------------------------------


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

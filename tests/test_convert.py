"""LoRALinear from other libraries' layers and state dicts: the same outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.convert import block_diagonal

K, N = 12, 18
X = torch.linspace(-1, 1, 5 * K).view(5, K)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomised(layer):
    """lora_B starts at zero everywhere."""
    for name, p in layer.named_parameters():
        if "lora_" in name.lower():
            nn.init.normal_(p, std=0.3)
    return layer


def assert_same(layer, ours):
    """y and dx in training mode, without dropout; leaves the other gradients for the caller."""
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected, got = layer(x), ours(y)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    got.backward(dy)
    torch.testing.assert_close(y.grad, x.grad)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


def grads(layer, a, b):
    return layer.get_parameter(a).grad, layer.get_parameter(b).grad


# ---- the layers as their libraries document them -------------------------------------------------


class Torchtune(nn.Module):
    """torchtune.modules.peft.LoRALinear."""

    def __init__(self, dropout=0.0, bias=True):
        super().__init__()
        base = nn.Linear(K, N, bias=bias)
        self.rank, self.alpha, self.disabled, self.merged = 4, 6.0, False, False
        self.weight, self.bias = base.weight, base.bias
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(K, self.rank, bias=False)
        self.lora_b = nn.Linear(self.rank, N, bias=False)

    def forward(self, x):
        out = nn.functional.linear(x, self.weight, self.bias)
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


class Litgpt(nn.Module):
    """litgpt.lora.LoRALinear."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(K, N)
        self.r, self.lora_alpha, self.scaling, self.merged = 4, 6, 1.5, False
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else lambda x: x
        self.lora_A = nn.Parameter(torch.empty(self.r, K))
        self.lora_B = nn.Parameter(torch.empty(N, self.r))

    def forward(self, x):
        lora = self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T
        return self.linear(x) + lora * self.scaling


class LitgptQKV(nn.Module):
    """litgpt.lora.LoRAQKVLinear: q of head_size · n_head rows, k and v of head_size · groups."""

    def __init__(self, enable_lora, head_size=3, n_head=4, n_query_groups=1):
        super().__init__()
        self.linear = nn.Linear(K, head_size * (n_head + 2 * n_query_groups))
        self.head_size, self.n_head, self.n_query_groups = head_size, n_head, n_query_groups
        self.r, self.scaling, self.merged = 2, 1.5, False
        self.enable_lora, self.lora_dropout = enable_lora, lambda x: x
        sizes = [head_size * n_head, head_size * n_query_groups, head_size * n_query_groups]
        self.qkv_shapes = [size for size, on in zip(sizes, enable_lora, strict=True) if on]
        self.lora_A = nn.Parameter(torch.empty(self.r * sum(enable_lora), K))
        self.lora_B = nn.Parameter(torch.empty(sum(self.qkv_shapes), self.r))
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        self.lora_ind = [
            row
            for start, size, on in zip(starts, sizes, enable_lora, strict=True)
            if on
            for row in range(start, start + size)
        ]

    def forward(self, x):
        after_a = (x @ self.lora_A.T).split(self.r, -1)
        parts = self.lora_B.split(self.qkv_shapes)
        after_b = torch.cat([a @ b.T for a, b in zip(after_a, parts, strict=True)], -1)
        out = self.linear(x)
        padded = torch.zeros_like(out).index_copy(-1, torch.tensor(self.lora_ind), after_b)
        return out + padded * self.scaling


def test_torchtune():
    layer = randomised(Torchtune())
    ours = lk.convert_layer(layer)
    assert_same(layer, ours)
    torch.testing.assert_close(
        grads(ours, "lora_a", "lora_b"), grads(layer, "lora_a.weight", "lora_b.weight")
    )
    assert ours.weight.data_ptr() == layer.weight.data_ptr(), "shared"
    assert ours.lora_a.data_ptr() != layer.lora_a.weight.data_ptr(), "copied"
    assert ours.scaling == 1.5 and ours.lora_alpha == 6
    assert lk.convert_layer(Torchtune(dropout=0.25, bias=False)).lora_dropout == 0.25


def test_litgpt():
    layer = randomised(Litgpt())
    ours = lk.convert_layer(layer)
    assert_same(layer, ours)
    torch.testing.assert_close(grads(ours, "lora_a", "lora_b"), grads(layer, "lora_A", "lora_B"))
    assert lk.convert_layer(Litgpt(dropout=0.25)).lora_dropout == 0.25


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("enable", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_litgpt_qkv(enable, groups):
    layer = randomised(LitgptQKV([bool(e) for e in enable], n_query_groups=groups))
    ours = lk.convert_layer(layer)
    assert ours.r == layer.r * sum(enable) and ours.scaling == layer.scaling
    assert_same(layer, ours)
    torch.testing.assert_close(ours.lora_a.grad, layer.lora_A.grad)


def test_block_diagonal():
    stacked = torch.arange(1.0, 11).view(5, 2)
    full = block_diagonal(stacked, [range(1, 3), range(4, 7)], 8)
    assert full.shape == (8, 4)
    assert torch.equal(full[1:3, :2], stacked[:2]) and torch.equal(full[4:7, 2:], stacked[2:])
    assert full.count_nonzero() == stacked.numel()


# ---- the libraries themselves --------------------------------------------------------------------


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loralib(fan_in_fan_out, bias):
    loralib = pytest.importorskip("loralib")
    layer = randomised(
        loralib.Linear(K, N, r=4, lora_alpha=6, fan_in_fan_out=fan_in_fan_out, bias=bias)
    )
    ours = lk.convert_layer(layer)
    assert_same(layer, ours)
    torch.testing.assert_close(grads(ours, "lora_a", "lora_b"), grads(layer, "lora_A", "lora_B"))
    assert ours.weight.shape == (N, K) and ours.weight.data_ptr() == layer.weight.data_ptr()
    layer.eval()
    with pytest.raises(ValueError, match=r"loralib.*Linear is merged, .*; call train\(\) first"):
        lk.convert_layer(layer)
    assert lk.convert_layer(loralib.Linear(K, N, r=2, lora_dropout=0.25)).lora_dropout == 0.25


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enable", [[1, 0, 1], [1, 1, 1], [0, 1, 0], [1, 1]])
def test_loralib_merged_linear(fan_in_fan_out, enable):
    loralib = pytest.importorskip("loralib")
    layer = randomised(loralib.MergedLinear(
        K, N, r=2, lora_alpha=3, enable_lora=[bool(e) for e in enable],
        fan_in_fan_out=fan_in_fan_out,
    ))  # fmt: skip
    ours = lk.convert_layer(layer)
    assert ours.r == 2 * sum(enable)
    assert_same(layer, ours)
    torch.testing.assert_close(ours.lora_a.grad, layer.lora_A.grad)


def test_layers_of_loralib_that_are_no_linear():
    loralib = pytest.importorskip("loralib")
    for layer in (
        loralib.Embedding(5, 4, r=2),
        loralib.Conv2d(2, 4, 3, r=2),
        loralib.Linear(K, N, r=0),
    ):
        with pytest.raises(TypeError, match=r"is no LoRA layer known here; expected peft.tuners"):
            lk.convert_layer(layer)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 7))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.body(x))


def peft_model(**kwargs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["0", "2"]) | kwargs)
    return randomised(peft.get_peft_model(Net(), config))


@pytest.mark.parametrize("kwargs", [{}, dict(use_rslora=True), dict(bias="all")], ids=str)
def test_a_model_of_peft(kwargs):
    model = peft_model(**kwargs)
    expected = model(X)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    name = "base_model.model.body.2."
    theirs = grads(model, name + "lora_A.default.weight", name + "lora_B.default.weight")
    assert lk.convert_model(model) == ["base_model.model.body.0", "base_model.model.body.2"]
    got = model(X)
    torch.testing.assert_close(got, expected)
    got.backward(dy)
    torch.testing.assert_close(grads(model, name + "lora_a", name + "lora_b"), theirs)


def test_conv1d_of_peft():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    peft = pytest.importorskip("peft")
    net = nn.Sequential(conv1d(N, K))
    nn.init.normal_(net[0].bias)
    config = peft.LoraConfig(r=4, target_modules=["0"], fan_in_fan_out=True)
    layer = randomised(peft.get_peft_model(net, config)).base_model.model[0]
    assert_same(layer, lk.convert_layer(layer))


def test_one_of_pefts_adapters():
    peft = pytest.importorskip("peft")
    model = peft_model(lora_dropout=0.25)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0"]))
    randomised(model)
    layer = model.base_model.model.body[0]
    assert lk.convert_layer(layer).lora_dropout == 0.25
    ours = lk.convert_layer(layer, adapter="other")
    assert (ours.r, ours.scaling, ours.lora_dropout) == (2, 2.5, 0.0)
    model.set_adapter("other")
    assert_same(layer, ours)
    layer.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"\['default', 'other'\], expected one; pass adapter=NAME"
    ):
        lk.convert_layer(layer)
    with pytest.raises(ValueError, match="has no adapter 'third', expected one of"):
        lk.convert_layer(layer, adapter="third")


REFUSED = {
    "DoRA": (dict(use_dora=True), None, "computes Dora.*; merge it with PEFT's merge_and_unload"),
    "lora_bias": (dict(lora_bias=True), None, "has lora_bias, expected plain LoRA"),
    "merged": ({}, lambda m: m.merge_adapter(), r"is merged, expected .*; call unmerge\(\)"),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "has its adapters disabled"),
}  # fmt: skip


@pytest.mark.parametrize("kwargs, change, match", REFUSED.values(), ids=REFUSED)
def test_layers_of_peft_that_compute_something_else(kwargs, change, match):
    model = peft_model(**kwargs)
    if change:
        change(model)
    before = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=match):
        lk.convert_model(model)
    assert list(map(type, model.modules())) == before


def test_what_is_no_lora_layer():
    with pytest.raises(TypeError, match=r"torch.nn.*Linear is no LoRA layer known here; expected"):
        lk.convert_layer(nn.Linear(K, N))
    with pytest.raises(
        ValueError, match=r"has no layer known here; expected peft.tuners.lora.Linear"
    ):
        lk.convert_model(Net())
    layer = Torchtune()
    layer.disabled = True
    with pytest.raises(ValueError, match="Torchtune is disabled, expected plain LoRA; enable it"):
        lk.convert_layer(layer)
    layer = Torchtune()
    layer.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"weight is Parameter of torch.uint8, expected .*dequantise"
    ):
        lk.convert_layer(layer)


def test_a_converted_layer_keeps_mode_dtype_and_device():
    layer = Torchtune().to(torch.bfloat16).eval()
    layer.lora_a.float(), layer.lora_b.float()
    ours = lk.convert_layer(layer)
    assert not ours.training and ours.weight.dtype == torch.bfloat16
    assert ours.lora_a.dtype == ours.lora_b.dtype == torch.float32


# ---- state dicts ---------------------------------------------------------------------------------


def peft_layer():
    return peft_model().base_model.model.body[0]


def loralib_layer():
    return randomised(pytest.importorskip("loralib").Linear(K, N, r=4, lora_alpha=6))


@pytest.mark.parametrize("make", [
    lambda: randomised(Torchtune()), lambda: randomised(Litgpt()), peft_layer, loralib_layer,
], ids=["torchtune", "litgpt", "peft", "loralib"])  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts(make, nested):
    layer = make()
    ours = lk.LoRALinear(K, N, 4, lora_alpha=6)
    state = layer.state_dict()
    if nested:
        nn.ModuleDict({"a": nn.Sequential(ours)}).load_state_dict(
            {f"a.0.{key}": value for key, value in state.items()}
        )
    else:
        ours.load_state_dict(state)
    assert_same(layer, ours)
    assert set(state) == set(layer.state_dict()), "the caller's dict is left alone"


def test_the_tensors_of_pefts_file():
    state = {
        "lora_A.weight": torch.randn(4, K), "lora_B.weight": torch.randn(N, 4),
        "weight": torch.randn(N, K), "bias": torch.randn(N),
    }  # fmt: skip
    ours = lk.LoRALinear(K, N, 4)
    ours.load_state_dict(state)
    assert torch.equal(ours.lora_a, state["lora_A.weight"])
    assert torch.equal(ours.lora_b, state["lora_B.weight"])


def test_names_that_are_ambiguous():
    state = lk.LoRALinear(K, N, 4).state_dict()
    for key in ("lora_A", "lora_A.default.weight"):
        with pytest.raises(
            RuntimeError, match=rf"lora_a, {key} could each be lora_a, expected one"
        ):
            lk.LoRALinear(K, N, 4).load_state_dict(state | {key: torch.zeros(4, K)})
    two = {f"lora_A.{name}.weight": torch.zeros(4, K) for name in ("x", "y")}
    with pytest.raises(RuntimeError, match=r"0.lora_A.x.weight, 0.lora_A.y.weight could each be"):
        nn.Sequential(lk.LoRALinear(K, N, 4)).load_state_dict({f"0.{k}": v for k, v in two.items()})


def test_foreign_keys_are_still_unexpected():
    state = lk.LoRALinear(K, N, 4).state_dict() | {"lora_magnitude_vector": torch.zeros(N)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lora_magnitude_vector"'):
        lk.LoRALinear(K, N, 4).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"lora_a"'):
        lk.LoRALinear(K, N, 4).load_state_dict({"weight": torch.zeros(N, K)})

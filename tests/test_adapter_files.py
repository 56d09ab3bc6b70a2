"""Adapters in PEFT's format: the round trip with PEFT, and what a loaded model computes."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_cases import VARIANTS
from torch import nn

import lora_kernels as lk
from lora_kernels import adapter_config

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 8)
        self.up_proj = nn.Linear(12, 16, bias=False)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.up_proj(x)], -1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        return self.head(torch.cat([layer(x) for layer in self.layers], -1))


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype).eval()


X = torch.linspace(-1, 1, 36).view(3, 12)


def trained_peft(**kwargs):
    settings = dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]) | kwargs
    model = peft.get_peft_model(base(), peft.LoraConfig(**settings))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model.eval()


def injected(seed=1, **kwargs):
    model = base()
    settings = dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]) | kwargs
    names = lk.inject(model, **settings)
    torch.manual_seed(seed)
    for name in names:
        nn.init.normal_(model.get_submodule(name).lora_b)
    return model.eval()


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


CONFIGS = {
    "plain": {},
    "rslora": dict(use_rslora=True, r=3),
    "patterns": dict(
        rank_pattern={"q_proj": 2, "layers.1.up_proj": 5}, alpha_pattern={"layers.0.q_proj": 1}
    ),
    "anchored": dict(rank_pattern={"^layers.0.q_proj": 7}, alpha_pattern={"^q_proj": 3}),
    "some layers": dict(layers_to_transform=[1], layers_pattern="layers", exclude_modules=["head"]),
    "gaussian": dict(init_lora_weights="gaussian", lora_dropout=0.25),
    "negative alpha": dict(lora_alpha=-2),
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("kwargs", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("has_layers", [False, True], ids=["linear", "LoRALinear"])
def test_peft_saves_and_we_load(tmp_path, kwargs, has_layers):
    theirs = trained_peft(**kwargs)
    theirs.save_pretrained(tmp_path)
    ours = base()
    if has_layers:
        names = lk.load_adapter(base(), tmp_path)
        for name in names:  # with another alpha and dropout
            r = dict(lk.read_adapter(tmp_path).tensors)[name][0].shape[0]
            lk.inject(ours, r=r, lora_alpha=99, lora_dropout=0.5, target_modules=[name])
    names = lk.load_adapter(ours, tmp_path)
    adapted = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert sorted(names) == sorted(n.removeprefix("base_model.model.") for n in adapted)
    torch.testing.assert_close(ours(X), theirs(X))
    assert not torch.allclose(ours(X), base()(X)), "the adapter counts"
    dropout = 0.5 if has_layers else kwargs.get("lora_dropout", 0.0)
    assert all(ours.get_submodule(name).lora_dropout == dropout for name in names)


OWN = {
    "plain": lambda model: None,
    "rslora": lambda model: [
        m._scale(5, True) for m in model.modules() if isinstance(m, lk.LoRALinear)
    ],
    "one rslora": lambda model: model.layers[0].q_proj._scale(5, True),
    "own scaling": lambda model: setattr(model.layers[1].q_proj, "scaling", 0.75),
    "own rank": lambda model: setattr(
        model.layers[0], "q_proj", rank_seven(model.layers[0].q_proj)
    ),
    "whole names": lambda model: setattr(model.layers[0], "q_proj", base().layers[0].q_proj),
    "merged": lambda model: model.layers[0].q_proj.merge(),
}


def rank_seven(layer):
    made = lk.LoRALinear(12, 8, 7, lora_alpha=3)
    made.load_state_dict(layer.state_dict() | {
        "lora_a": torch.randn(7, 12), "lora_b": torch.randn(8, 7),
    })  # fmt: skip
    return made.eval()


@pytest.mark.parametrize("change", OWN.values(), ids=OWN)
def test_we_save_and_peft_loads(tmp_path, change):
    ours = injected()
    change(ours)
    lk.save_adapter(ours, tmp_path / "new" / "folder", base_model_name_or_path="some/model")
    path = tmp_path / "new" / "folder"
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert config_of(path)["base_model_name_or_path"] == "some/model"
    theirs = peft.PeftModel.from_pretrained(base(), path).eval()
    torch.testing.assert_close(theirs(X), ours(X))
    again = base()
    lk.load_adapter(again, path)
    torch.testing.assert_close(again(X), ours(X))
    other = trained_peft()
    other.load_adapter(path, "ours")
    other.set_adapter("ours")
    torch.testing.assert_close(other.eval()(X), ours(X))


class Named(nn.Module):
    """Names that a suffix, or a dot taken for any character, confuses."""

    def __init__(self):
        super().__init__()
        self.a = nn.Module()
        self.a.b = nn.Linear(12, 12)
        self.a_b = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)

    def forward(self, x):
        return self.a.b(x) + 2 * self.a_b(x) + 3 * self.b(x)


@pytest.mark.parametrize("names", [["a.b", "a_b", "b"], ["b"], ["a.b", "a_b"]])
def test_names_that_look_alike(tmp_path, names):
    torch.manual_seed(0)
    model = Named()
    fresh = Named()
    fresh.load_state_dict(model.state_dict())
    plain = Named()
    plain.load_state_dict(model.state_dict())
    for rank, name in enumerate(names, 2):
        layer = lk.LoRALinear.from_linear(model.get_submodule(name), rank, lora_alpha=rank * rank)
        nn.init.normal_(layer.lora_b)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    lk.save_adapter(model, tmp_path)
    assert lk.load_adapter(fresh, tmp_path) == sorted(names)
    torch.testing.assert_close(fresh(X), model(X))
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(X), model(X))
    count = sum(isinstance(m, peft.tuners.lora.Linear) for m in loaded.modules())
    assert count == len(names)


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(tmp_path, saved, weight):
    source = injected(adapter_dtype=saved)
    lk.save_adapter(source, tmp_path)
    model = base(weight)
    lk.load_adapter(model, tmp_path)
    layer = model.layers[0].q_proj
    assert layer.lora_a.dtype == (saved if saved == weight else torch.float32)
    assert torch.equal(layer.lora_a, source.layers[0].q_proj.lora_a.to(layer.lora_a.dtype))
    assert model(X.to(weight)).dtype == weight


def test_a_loaded_model_trains_and_shares_the_weight(tmp_path):
    lk.save_adapter(injected(), tmp_path)
    model = base()
    weight = model.layers[0].q_proj.weight
    lk.load_adapter(model, tmp_path)
    layer = model.layers[0].q_proj
    assert layer.weight.data_ptr() == weight.data_ptr() and not layer.training
    model(X).sum().backward()
    assert layer.lora_a.grad is not None and layer.weight.grad is None


def test_loading_into_a_merged_layer(tmp_path):
    source = injected()
    lk.save_adapter(source, tmp_path)
    model = injected(seed=2)
    for name in ("q_proj", "up_proj"):
        getattr(model.layers[0], name).merge()
    lk.load_adapter(model, tmp_path)
    assert model.layers[0].q_proj.merged
    torch.testing.assert_close(model(X), source(X))


def test_one_module_under_two_names(tmp_path):
    model = base()
    model.layers[1].q_proj = model.layers[0].q_proj
    names = lk.inject(model, r=4, target_modules=["q_proj"])
    assert names == ["layers.0.q_proj", "layers.1.q_proj"]
    assert model.layers[0].q_proj is model.layers[1].q_proj
    nn.init.normal_(model.layers[0].q_proj.lora_b)
    lk.save_adapter(model, tmp_path)
    other = base()
    other.layers[1].q_proj = other.layers[0].q_proj
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), model(X))
    lk.save_adapter(injected(), tmp_path)
    with pytest.raises(lk.AdapterError, match=r"layers.1.q_proj: got the module of layers.0"):
        lk.load_adapter(other, tmp_path)


def test_inject_is_a_new_layer_on_the_same_weight():
    model = base()
    names = lk.inject(model, r=3, target_modules=["q_proj"], lora_alpha=6, lora_dropout=0.5)
    assert names == ["layers.0.q_proj", "layers.1.q_proj"]
    layer = model.layers[1].q_proj
    assert (layer.r, layer.scaling, layer.lora_dropout, layer.training) == (3, 2.0, 0.5, False)
    torch.testing.assert_close(model(X), base()(X))
    assert type(model.layers[0].up_proj) is nn.Linear


@pytest.mark.parametrize("target, problem", [
    (["q_proj", "k_proj"], "'k_proj', but the model has no such module"),
    (["layers.0"], r"layers.0 is .*Block, expected a plain torch.nn.Linear"),
    (["proj"], "'proj', but the model has no such module"),
    (["head"], "head is an nn.Linear with hooks"),
])  # fmt: skip
def test_inject_refuses_and_changes_nothing(target, problem):
    model = base()
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=problem):
        lk.inject(model, r=2, target_modules=["up_proj", *target])
    assert not any(isinstance(m, lk.LoRALinear) for m in model.modules())


def test_inject_takes_a_list():
    with pytest.raises(TypeError, match=r"pass \['q_proj'\]"):
        lk.inject(base(), r=2, target_modules="q_proj")
    for bad in (None, 3, ["q_proj", 3]):
        with pytest.raises(TypeError, match="inject: target_modules must be a list of names, but"):
            lk.inject(base(), r=2, target_modules=bad)
    with pytest.raises(ValueError, match="r must be >= 0"):
        lk.inject(model := base(), r=-1, target_modules=["q_proj"])
    assert not any(isinstance(m, lk.LoRALinear) for m in model.modules())


UNSAVABLE = {
    "no LoRALinear": (lambda m: base(), "no LoRALinear.*make some with lora_kernels.inject"),
    "alone": (lambda m: m.layers[0].q_proj, "put it into a model"),
    "rank 0": (lambda m: replaced(m, r=0), r"r: got 0, expected an integer in 1..4096"),
    "another rank 0": (lambda m: replaced(m, 1, r=0), r"'\^layers.1.q_proj'\]: got 0"),
    "dropout": (lambda m: replaced(m, 1, r=4, lora_dropout=0.5), "PEFT's config has one"),
    "float64": (lambda m: m.double(), "torch.float64, expected dtype F16, BF16, F32"),
    "scaling": (lambda m: scaled(m), "lora_alpha: got inf, expected a finite number"),
}  # fmt: skip


def replaced(model, layer=0, **kwargs):
    model.layers[layer].q_proj = lk.LoRALinear(12, 8, **kwargs)
    return model


def scaled(model):
    model.layers[0].q_proj.scaling = float("inf")
    return model


@pytest.mark.parametrize("change, problem", UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, change, problem):
    with pytest.raises(lk.AdapterError, match=problem):
        lk.save_adapter(change(injected()), tmp_path)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.safetensors"))


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(lk.AdapterError, match="got a file, expected a directory"):
        lk.save_adapter(injected(), tmp_path / "adapter")


def test_non_finite_values_are_saved_and_loaded_only_on_request(tmp_path):
    source = injected()
    source.layers[0].q_proj.lora_a.data[1, 2] = torch.nan
    lk.save_adapter(source, tmp_path)
    with pytest.raises(lk.AdapterError, match=r"layers.0.q_proj.lora_A.weight: got Inf or NaN"):
        lk.load_adapter(base(), tmp_path)
    model = base()
    lk.load_adapter(model, tmp_path, check_finite=False)
    assert model.layers[0].q_proj.lora_a[1, 2].isnan()


def test_every_field_of_pefts_config_is_known():
    """A field that a new PEFT adds is inert only when somebody has looked at it."""
    known = adapter_config.INERT | adapter_config.READ | VARIANTS.keys()
    assert set(peft.LoraConfig().to_dict()) | {"runtime_config"} == known

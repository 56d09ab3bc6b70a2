"""Adopting: PEFT's operations on applied models, apply and patch_peft and back, report."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_layers import PEFTS_OWN, K, N, Net, add_second, assert_same, model_of, run, x_of

import lora_kernels as lk
from lora_kernels import peft_linear


@pytest.fixture(autouse=True)
def clean():
    yield
    if peft_linear.patched():
        lora.Linear.forward = peft_linear.fused_forward
        lk.unpatch_peft()
    assert lora.Linear.forward is PEFTS_OWN


# ---- PEFT's own operations -----------------------------------------------------------------------


def weighted(model):
    add_second(model)
    model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "mix", combination_type="svd")
    model.set_adapter("mix")


def disabled_and_back(model):
    with model.disable_adapter():
        model(torch.zeros(1, K))


def deleted(model):
    add_second(model)
    model.set_adapter("b")
    model.delete_adapter("default")


OPERATIONS = {
    "second_adapter": lambda model: (add_second(model), model.set_adapter("b")),
    "weighted": weighted,
    "disabled_and_back": disabled_and_back,
    "deleted": deleted,
    "merged_and_unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "deepcopy": lambda model: None,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_of_peft(fused, operation):
    want, got = model_of(), lk.apply(model_of())
    operation(want), operation(got)
    got = copy.deepcopy(got)
    assert_same(run(got, x_of(5, K)), run(want, x_of(5, K)))
    assert fused
    torch.testing.assert_close(
        got.merge_and_unload()(x_of(5, K)), want.merge_and_unload()(x_of(5, K))
    )


def test_save_and_load(fused, tmp_path):
    model, x = lk.apply(model_of()), x_of(5, K)
    model.save_pretrained(tmp_path / "fused")
    plain = model_of()
    plain.save_pretrained(tmp_path / "plain")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "fused").iterdir()) == files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "fused")
    torch.testing.assert_close(loaded(x), model(x))
    assert not any(isinstance(m, peft_linear.FusedLoraLinear) for m in loaded.modules())
    assert list(model.state_dict()) == list(plain.state_dict())


def test_pickle(fused):
    model, x = lk.apply(model_of()), x_of(5, K)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert len(fused) == 4


def test_hotswap(fused, tmp_path):
    other = model_of(r=2, lora_alpha=6)
    with torch.no_grad():
        [p.mul_(2) for name, p in other.named_parameters() if "lora_" in name]
    other.save_pretrained(tmp_path)
    models = model_of(), lk.apply(model_of())
    for model in models:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        hotswap_adapter(model, tmp_path, "default")
    x = x_of(5, K)
    torch.testing.assert_close(models[1](x), models[0](x))
    torch.testing.assert_close(models[1](x), other(x))
    assert len(fused) == 4


# ---- adopting ------------------------------------------------------------------------------------


def test_apply_twice_and_unapply():
    model = model_of()
    assert lk.apply(lk.apply(model)) is model
    assert lk.report(model).fused == 2
    assert lk.unapply(model) is model
    assert {type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)} == {lora.Linear}
    assert lk.report(model).fused == 0


def test_apply_covers_adapters_that_come_later(fused):
    model = lk.apply(model_of())
    add_second(model)
    model.set_adapter("b")
    model(x_of(4, K))
    assert len(fused) == 1  # "b" is on one of the two


def test_patch_covers_models_built_later(fused):
    x = x_of(4, K)
    lk.patch_peft()
    patched = model_of()
    got = patched(x)
    assert len(fused) == 2 and lk.report(patched).fused == 2
    lk.unpatch_peft()
    torch.testing.assert_close(patched(x), got)
    assert len(fused) == 2 and lora.Linear.forward is PEFTS_OWN


def test_patch_as_a_context(fused):
    model, x = model_of(), x_of(4, K)
    with lk.patch_peft():
        with lk.patch_peft():  # harmless: the outer one unpatches
            model(x)
        model(x)
    assert len(fused) == 4 and lora.Linear.forward is PEFTS_OWN
    with pytest.raises(ZeroDivisionError), lk.patch_peft():
        1 / 0  # noqa: B018
    assert lora.Linear.forward is PEFTS_OWN


def test_patching_twice_is_once():
    lk.patch_peft()
    lk.patch_peft()
    lk.unpatch_peft()
    assert lora.Linear.forward is PEFTS_OWN


def test_unpatching_what_was_never_patched():
    with pytest.raises(RuntimeError, match=r"PEFT is not patched; call lora_kernels\.patch_peft"):
        lk.unpatch_peft()


def test_unpatching_over_somebody_elses_patch(monkeypatch):
    lk.patch_peft()
    monkeypatch.setattr(lora.Linear, "forward", Net.forward)
    with pytest.raises(RuntimeError, match=r"peft_layers\.Net\.forward, which replaced the fused"):
        lk.unpatch_peft()
    monkeypatch.undo()
    lk.unpatch_peft()


def test_patching_over_an_unpatching_of_somebody_elses(fused):
    """Who sets PEFT's own forward back has unpatched, and patching again patches."""
    lk.patch_peft()
    lora.Linear.forward = PEFTS_OWN
    with pytest.raises(RuntimeError, match="PEFT is not patched"):
        lk.unpatch_peft()
    lk.patch_peft()
    model_of()(x_of(3, K))
    assert len(fused) == 2


def test_context_that_was_unpatched_inside(monkeypatch):
    with lk.patch_peft():
        lk.unpatch_peft()
    assert lora.Linear.forward is PEFTS_OWN
    with pytest.raises(ZeroDivisionError), lk.patch_peft():
        monkeypatch.setattr(lora.Linear, "forward", Net.forward)
        1 / 0  # noqa: B018
    monkeypatch.undo()
    lk.unpatch_peft()


def test_unapplying_what_fully_shard_has_made():
    model = lk.apply(model_of())
    layer = model.base_model.model.up
    layer.__class__ = type("FSDPFusedLoraLinear", (peft_linear.FusedLoraLinear,), {})
    with pytest.raises(RuntimeError, match=r"FSDPFusedLoraLinear, a class that fully_shard made"):
        lk.unapply(model)
    assert lk.report(model).fused == 2


def test_apply_while_patched_falls_back_to_pefts_forward(fused):
    model = lk.apply(model_of())
    with lk.patch_peft():
        model.disable_adapter_layers()
        model(x_of(3, K))
    assert not fused


def test_no_lora_layer():
    net = Net()
    with pytest.warns(UserWarning, match=r"Net has no peft\.tuners\.lora\.Linear, so nothing"):
        assert lk.apply(net) is net
    assert str(lk.report(net)) == "no LoRA layer: the model has no PEFT adapter and no LoRALinear"


@pytest.mark.parametrize("op", [lk.apply, lk.unapply, lk.report])
def test_not_a_module(op):
    with pytest.raises(TypeError, match=rf"{op.__name__}: model must be a torch.nn.Module, but"):
        op("model")


def test_report_as_a_table():
    model = model_of()
    model.base_model.model.ours = lk.LoRALinear(4, 4, 2)
    model.base_model.model.down.lora_A["default"].register_forward_hook(lambda *_: None)
    text = str(lk.report(model))
    assert "1 of 3 LoRA layers fused" in text and "not applied: call lora_kernels.apply" in text
    lk.apply(model)
    found = lk.report(model)
    assert [layer.name for layer in found.layers if not layer.why_not] == [
        "base_model.model.up", "base_model.model.ours",
    ]  # fmt: skip
    assert "a hook or a forward of its own" in str(found)


def test_report_on_other_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, K), nn.Linear(K, N))
    config = LoraConfig(target_modules=["0", "1"])
    model = lk.apply(get_peft_model(net, config))
    kinds = {layer.kind: layer.why_not for layer in lk.report(model).layers}
    assert kinds["lora.Embedding"] == "lora.Embedding has a forward of its own"
    assert kinds["lora.FusedLoraLinear"] == ""
    model.base_model.model[1].forward = lambda x: x
    assert lk.report(model).layers[1].why_not == "the layer's forward was replaced"


@pytest.mark.parametrize("op", [lk.apply, lk.unapply])
def test_peft_is_missing(monkeypatch, op):
    monkeypatch.delitem(sys.modules, "lora_kernels.peft_linear")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft is not installed; pip install peft, or use LoRA"):
        op(nn.Linear(2, 2))


def test_peft_is_too_old(monkeypatch):
    monkeypatch.setattr(peft_linear.peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"peft 0\.17\.1 is older than 0\.18.*pip install -U"):
        lk.patch_peft()
    assert "peft 0.17.1 is older than 0.18" in str(lk.report(model_of()))


def test_peft_of_an_unknown_forward(monkeypatch):
    monkeypatch.setattr(lora.Linear, "forward", Net.forward)
    monkeypatch.setattr(peft_linear.peft, "__version__", "9.9")
    with pytest.warns(UserWarning, match=r"forward of peft 9\.9 is not the one of 0\.18\.1 to"):
        lk.apply(model_of())


def test_the_forward_of_this_peft_is_known(recwarn):
    lk.apply(model_of())
    assert not recwarn.list

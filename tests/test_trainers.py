"""Other people's trainers with one line changed: transformers, TRL, Lightning, axolotl's plugin."""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

WORDS = ["<pad>", "<eos>", "the", "cat", "dog", "sat", "ran", "on", "under", "mat", "rug", "a"]
SENTENCES = [
    f"the {who} {did} {where} a {what}"
    for who, did, where, what in itertools.product(
        ("cat", "dog"), ("sat", "ran"), ("on", "under"), ("mat", "rug")
    )
]
STEPS = 6


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    inner = Tokenizer(words)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora_config(**config):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    )


COMMON = dict(
    max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
    report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True, seed=3,
    gradient_checkpointing=True, save_steps=3, lr_scheduler_type="constant",
)  # fmt: skip


def losses(trainer) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


# ---- transformers --------------------------------------------------------------------------------


def train(model, tokenizer, folder, resume=None, **arguments):
    """transformers' own Trainer over SENTENCES, evaluated and saved."""
    rows = datasets.Dataset.from_dict(dict(tokenizer(SENTENCES)))
    if isinstance(model, peft.PeftModel):
        model.enable_input_require_grads()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**COMMON, **arguments}),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_equals_unpatched(fused, tokenizer, tmp_path, bf16):
    found = {}
    for how in ("own", "applied"):
        model = peft.get_peft_model(llama(), lora_config())
        if how == "applied":
            model = lk.apply(model)
        assert bool(fused) is False
        trainer, evaluated = train(model, tokenizer, tmp_path / how, bf16=bf16)
        found[how] = torch.cat([losses(trainer), torch.tensor([evaluated])])
    # gradient checkpointing runs each layer's forward twice; evaluation once
    assert len(fused) >= 2 * STEPS * 14
    tolerance = dict(rtol=2e-2, atol=2e-2) if bf16 else dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["applied"], found["own"], **tolerance)
    assert found["own"][-1] < found["own"][0] - 0.2, "nothing was learned"


def test_trainer_saves_and_resumes(fused, tokenizer, tmp_path):
    """A run that is broken off and resumed, dropout and all, is the run that was not."""
    config = lora_config(lora_dropout=0.2)
    whole, _ = train(lk.apply(peft.get_peft_model(llama(), config)), tokenizer, tmp_path / "a")
    model = lk.apply(peft.get_peft_model(llama(), config))
    again, _ = train(model, tokenizer, tmp_path / "b", resume=str(tmp_path / "a/checkpoint-3"))
    torch.testing.assert_close(losses(again)[3:], losses(whole)[3:], rtol=1e-4, atol=1e-4)
    files = {p.name for p in (tmp_path / "a/checkpoint-6").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "a/checkpoint-6")
    ids = torch.tensor([tokenizer(SENTENCES[0])["input_ids"]])
    trained = whole.model.eval()
    torch.testing.assert_close(
        loaded.to(trained.device)(input_ids=ids.to(trained.device)).logits,
        trained(input_ids=ids.to(trained.device)).logits,
    )


# ---- TRL -----------------------------------------------------------------------------------------


def test_sft_trainer(fused, tokenizer, tmp_path):
    """TRL builds the PEFT model itself, out of reach for anything but patch_peft."""
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_dict({"text": SENTENCES})
    found = {}
    for how in ("own", "patched"):
        if how == "patched":
            lk.patch_peft()
        try:
            trainer = trl.SFTTrainer(
                llama(),
                trl.SFTConfig(str(tmp_path / how), bf16=True, max_length=16, **COMMON),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=lora_config(),
            )
            trainer.train()
            report = lk.report(trainer.model)
        finally:
            if how == "patched":
                lk.unpatch_peft()
        found[how] = losses(trainer)
        assert report.fused == (14 if how == "patched" else 0)
        assert bool(fused) == (how == "patched")
    torch.testing.assert_close(found["patched"], found["own"], rtol=2e-2, atol=2e-2)
    assert found["own"][-1] < found["own"][0] - 0.2


def test_beside_liger(fused, tokenizer, tmp_path):
    """Liger patches norms and the MLP around the LoRA layers; it needs Triton on a GPU."""
    liger = pytest.importorskip("liger_kernel.transformers")
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels need a GPU")
    model = llama()
    liger.apply_liger_kernel_to_llama(model=model)
    model = lk.apply(peft.get_peft_model(model.cuda(), lora_config()))
    train(model, tokenizer, tmp_path, bf16=True)
    assert fused


# ---- Lightning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("built_in", ["__init__", "configure_model"])
def test_lightning(fused, tokenizer, tmp_path, built_in):
    lightning = pytest.importorskip("lightning.pytorch")
    from lora_kernels.integrations.lightning import LoraKernels

    ids = torch.tensor(tokenizer(SENTENCES)["input_ids"])

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seen = None, []
            if built_in == "__init__":
                self.configure_model()

        def configure_model(self):
            if self.model is None:
                self.model = peft.get_peft_model(llama(), lora_config())

        def training_step(self, batch, index):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=1e-2)

    found = {}
    for how, callbacks in (("own", []), ("applied", [LoraKernels()])):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=4, precision="bf16-mixed", callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=4))
        found[how] = torch.tensor(module.seen)
        assert bool(fused) == (how == "applied")
    torch.testing.assert_close(found["applied"], found["own"], rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="not patched"):  # the callback has taken it back
        lk.unpatch_peft()


# ---- axolotl -------------------------------------------------------------------------------------


def test_axolotl_plugin(monkeypatch, fused):
    """Against the one class that the plugin needs: axolotl itself pins other versions of torch."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "lora_kernels.integrations.axolotl", raising=False)
    plugin = importlib.import_module("lora_kernels.integrations.axolotl").LoraKernelsPlugin()
    monkeypatch.delitem(sys.modules, "lora_kernels.integrations.axolotl")
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(6, 5))
    )
    plugin.post_lora_load({}, model)
    model(torch.randn(3, 6))
    assert len(fused) == 1

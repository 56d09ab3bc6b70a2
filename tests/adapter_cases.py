"""An adapter of one layer as bytes, to be spoilt: A [2, 4] and B [3, 2] of `lin`."""

from __future__ import annotations

import json
import struct

import torch
from torch import nn

from lora_kernels.adapter_files import CONFIG, TENSORS

A, B = "base_model.model.lin.lora_A.weight", "base_model.model.lin.lora_B.weight"
SETTINGS = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["lin"])


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"lin": nn.Linear(4, 3), "embed": nn.Embedding(3, 4)})


def entry(shape, begin, end, dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=[begin, end])


def header(changes=None):
    """A [2, 4] and B [3, 2] in fp32: 32 and 24 bytes."""
    fields = {A: entry([2, 4], 0, 32), B: entry([3, 2], 32, 56)} | (changes or {})
    return {key: value for key, value in fields.items() if value is not None}


def file(changes=None, payload=56):
    """A safetensors file of ones with these changes to its header."""
    return with_header(json.dumps(header(changes)).encode(), payload)


def with_header(text, payload=56):
    values = torch.ones(payload // 4 + 1).numpy().tobytes()[:payload]
    return struct.pack("<Q", len(text)) + text + values


def write(path, tensors=None, config=None):
    (path / TENSORS).write_bytes(file() if tensors is None else tensors)
    if not isinstance(config, bytes):
        config = json.dumps(SETTINGS | (config or {})).encode()
    (path / CONFIG).write_bytes(config)
    return path


# Fields of PEFT's config that ask for another forward.
VARIANTS = {
    "use_dora": True, "use_bdlora": {"a": 1}, "use_qalora": True, "lora_bias": True,
    "velora_config": {"a": 1}, "monteclora_config": {"a": 1}, "kasa_config": {"a": 1},
    "arrow_config": {"a": 1}, "alora_invocation_tokens": [1], "target_parameters": ["w"],
    "modules_to_save": ["head"], "layer_replication": [[0, 2]], "trainable_token_indices": [3],
    "megatron_config": {"a": 1},
}  # fmt: skip

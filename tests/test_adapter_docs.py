"""docs/adapters.md: its code runs, its limits are the constants, its layers are those known."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import code_of, table_of
from torch import nn

from lora_kernels import adapter_config, adapter_tensors, convert
from lora_kernels.linear import LoRALinear

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code_of(PAGE), str(PAGE), "exec"), found)
    assert found["names"] == ["q_proj", "v_proj"] and found["config"].r == 8
    assert found["tensors"]["v_proj"][1].shape == (32, 8)
    assert isinstance(found["model"], nn.Sequential) and isinstance(found["model"][0], LoRALinear)


def test_the_limits_are_the_constants():
    limits = [int(limit.split()[0]) for _, limit in table_of(PAGE, "## What is refused")]
    assert limits == [
        adapter_tensors.MAX_BYTES,
        adapter_tensors.MAX_HEADER_BYTES,
        adapter_tensors.MAX_TENSORS,
        adapter_config.MAX_NAME_LENGTH,
        adapter_config.MAX_CONFIG_BYTES,
        adapter_config.MAX_CONFIG_DEPTH,
        adapter_config.MAX_NAMES,
        adapter_config.MAX_RANK,
    ]


def test_the_layers_are_those_that_the_error_names():
    rows = [row[0].split(" `") for row in table_of(PAGE, "## Other libraries")]
    for library, layer in rows:
        assert layer.strip("`").removeprefix("lora.") in convert.SUPPORTED
        assert library.lower() in convert.SUPPORTED

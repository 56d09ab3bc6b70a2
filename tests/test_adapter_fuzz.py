"""Adapter files of any bytes: loaded, or refused by AdapterError, in little memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from adapter_cases import SETTINGS, A, B, file, header, model, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_kernels as lk
from lora_kernels import adapter_tensors
from lora_kernels.adapter_files import CONFIG, TENSORS

pytest.importorskip("safetensors")

GOOD_CONFIG = json.dumps(SETTINGS).encode()
GOOD = file()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw, data):
    """Bytes changed, inserted and removed, then perhaps the end cut off."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found) - 1))
        kind = draw(st.sampled_from(["set", "insert", "remove"]))
        byte = draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789{}[],":-eE')))
        found[at : at + (kind != "insert")] = [byte] * (kind != "remove")
    return bytes(found[: draw(st.integers(0, len(found)))] if draw(st.booleans()) else found)


@st.composite
def other_header(draw):
    """A header of the right form with values of any kind in it."""
    fields = header()
    for _ in range(draw(st.integers(1, 3))):
        at = fields
        key = draw(st.sampled_from([A, B, "lin.lora_A.weight", "__metadata__"]))
        if draw(st.booleans()) and isinstance(at.get(key), dict):
            at, key = at[key], draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))
        at[key] = draw(JSON | st.lists(st.integers(-1, 64), max_size=3))
    return with_header(json.dumps(fields).encode(), draw(st.sampled_from([56, 0, 64])))


@st.composite
def other_config(draw):
    keys = [*SETTINGS, "rank_pattern", "lora_dropout", "use_dora", "exclude_modules", "a"]
    value = JSON | st.dictionaries(st.just("lin"), SCALARS)
    return json.dumps(SETTINGS | draw(st.dictionaries(st.sampled_from(keys), value))).encode()


FUZZ = settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
LIMIT = 8 << 20  # of what the parsers may allocate beside a file of under a kilobyte


def load_or_refuse(path, data, config):
    """Loads what is an adapter and refuses the rest by AdapterError alone, within the limit."""
    (path / TENSORS).write_bytes(data)
    (path / CONFIG).write_bytes(config)
    target = model()
    tracemalloc.start()
    try:
        lk.load_adapter(target, path)
    except lk.AdapterError as error:
        assert len(str(error)) < 1000 and type(target["lin"]) is nn.Linear
    else:
        assert target["lin"].lora_a.isfinite().all() and target["lin"].lora_b.isfinite().all()
        assert target["lin"].lora_a.shape == (target["lin"].r, 4)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LIMIT


@FUZZ
@given(data=mutated(GOOD) | other_header() | st.binary(max_size=64))
def test_fuzzed_tensor_files(tmp_path, data):
    load_or_refuse(tmp_path, data, GOOD_CONFIG)


@FUZZ
@given(config=mutated(GOOD_CONFIG) | other_config())
def test_fuzzed_configs(tmp_path, config):
    load_or_refuse(tmp_path, GOOD, config)


def test_every_truncation(tmp_path):
    (tmp_path / CONFIG).write_bytes(GOOD_CONFIG)
    for length in range(len(GOOD)):
        (tmp_path / TENSORS).write_bytes(GOOD[:length])
        with pytest.raises(lk.AdapterError):
            lk.read_adapter(tmp_path)


def test_a_header_at_the_limit_stays_within_its_memory():
    """The densest JSON that the count of commas lets through."""
    commas = 8 * (adapter_tensors.MAX_TENSORS + 2)
    text = b"[" + b"[]," * commas + b"[]]"
    tracemalloc.start()
    with pytest.raises(lk.AdapterError, match="got list, expected a JSON object"):
        adapter_tensors.entries(text, 0, "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20

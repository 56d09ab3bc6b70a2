"""Adapter files from strangers: every rule of the loader refuses, and changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import tracemalloc

import pytest
import torch
from adapter_cases import (
    SETTINGS,
    VARIANTS,
    A,
    B,
    entry,
    file,
    header,
    model,
    with_header,
    write,
)  # fmt: skip
from torch import nn

import lora_kernels as lk
from lora_kernels import adapter_config, adapter_tensors
from lora_kernels.adapter_files import CONFIG, TENSORS

pytest.importorskip("safetensors")


def refused(path, match, exact=lk.AdapterError, **kwargs):
    target = model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(exact, match=match) as caught:
        lk.load_adapter(target, path, **kwargs)
    assert type(target["lin"]) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())
    assert len(str(caught.value).removeprefix(str(path))) < 1000
    return str(caught.value)


def test_the_file_that_the_refusals_start_from_loads(tmp_path):
    target = model()
    assert lk.load_adapter(target, write(tmp_path)) == ["lin"]
    assert torch.equal(target["lin"].lora_a, torch.ones(2, 4)) and target["lin"].scaling == 2


def test_a_message_says_where_what_and_the_way_out(tmp_path):
    message = refused(write(tmp_path, config=dict(r=True)), "r: got True")
    assert message == (
        f"{tmp_path / CONFIG}: r: got True, expected an integer in 1..4096; "
        "set it to the rows of lora_A"
    )


FINITE, RANK = "expected a finite number", "expected an integer in 1..4096"
NAME = r"a name of at most 512 characters, \[A-Za-z0-9_.\\-\]\+"
LITERAL = r"expected a list of 1 to 50000 module names \(a regular expression is never run\)"
CONFIGS = {
    "not JSON": (b"{", "JSONDecodeError: .* expected a JSON object; save the adapter again"),
    "not UTF-8": (b'{"r": "\xff"}', "UnicodeDecodeError: .* expected a JSON object"),
    "no object": (b"[]", "got list, expected a JSON object"),
    "empty": (b"", "expected a JSON object"),
    "too large": (b" " * ((1 << 20) + 1), "got 1048577 bytes, expected at most 1048576"),
    "too deep": ({"eva_config": json.loads("[" * 16 + "]" * 16)}, "got 17 levels, expected at"),
    "far too deep": (b"[" * 500_000, "RecursionError: .* expected a JSON object"),
    "duplicate key": (b'{"r": 2, "r": 4}', "duplicate key 'r', expected a JSON object"),
    "NaN": (b'{"r": NaN}', "NaN is not JSON"),
    "a huge integer": (b'{"r": ' + b"9" * 5000 + b"}", "ValueError: .* expected a JSON object"),
    "IA3": (dict(peft_type="IA3"), "peft_type: got 'IA3', expected 'LORA'; load other adapters"),
    "r zero": (dict(r=0), f"r: got 0, {RANK}; set it to the rows of lora_A"),
    "r too large": (dict(r=4097), f"r: got 4097, {RANK}"),
    "r a float": (dict(r=2.0), f"r: got 2.0, {RANK}"),
    "r a bool": (dict(r=True), f"r: got True, {RANK}"),
    "r missing": (dict(r=None), f"r: got None, {RANK}"),
    "alpha missing": (dict(lora_alpha=None), f"lora_alpha: got None, {FINITE}"),
    "alpha a bool": (dict(lora_alpha=True), f"lora_alpha: got True, {FINITE}"),
    "alpha infinite": (
        json.dumps(SETTINGS | dict(lora_alpha=1)).replace(": 1,", ": 1e999,").encode(),
        f"lora_alpha: got inf, {FINITE}",
    ),
    "alpha beyond float64": (dict(lora_alpha=10**400), f"lora_alpha: got 1000.*, {FINITE}"),
    "dropout one": (dict(lora_dropout=1), r"lora_dropout: got 1, expected a number in \[0, 1\)"),
    "dropout negative": (dict(lora_dropout=-0.1), r"expected a number in \[0, 1\); set 0"),
    "dropout text": (dict(lora_dropout="0.1"), f"lora_dropout: got '0.1', {FINITE}"),
    "rslora": (dict(use_rslora=1), "use_rslora: got 1, expected true or false"),
    "a regular expression": (dict(target_modules="(a+)+$"), rf"got '\(a\+\)\+\$', {LITERAL}"),
    "all-linear": (dict(target_modules="all-linear"), LITERAL),
    "no targets": (dict(target_modules=[]), "target_modules: got a list of 0, expected"),
    "targets missing": (dict(target_modules=None), f"target_modules: got None, {LITERAL}"),
    "too many targets": (dict(target_modules=["a"] * 50_001), "got a list of 50001, expected"),
    "an expression in the list": (dict(target_modules=["lin", ".*"]), f"got '.*', expected {NAME}"),
    "a number in the list": (dict(target_modules=[1]), f"got 1, expected {NAME}"),
    "a long name": (dict(target_modules=["a" * 513]), f"expected {NAME}"),
    "pattern no object": (dict(rank_pattern=[1]), r"rank_pattern: got \[1\], expected an object"),
    "pattern expression": (dict(rank_pattern={"(a+)+": 2}), r"rank_pattern: got '\(a\+\)\+'"),
    "pattern rank": (dict(rank_pattern={"x": 0}), rf"rank_pattern\['x'\]: got 0, {RANK}"),
    "pattern alpha": (dict(alpha_pattern={"x": "1"}), rf"alpha_pattern\['x'\]: got '1', {FINITE}"),
    "an unknown field": (dict(new_thing=1), "new_thing: got 1, expected null, false or empty"),
    "bias": (dict(bias="all"), "bias: got 'all', expected 'none': the bias is frozen"),
    "an init with a method's name": (
        dict(init_lora_weights="pissa"),
        "init_lora_weights: got 'pissa', expected one of True.*path_initial_model",
    ),
    "an init that is a number": (dict(init_lora_weights=1), "init_lora_weights: got 1"),
}  # fmt: skip


@pytest.mark.parametrize("config, match", CONFIGS.values(), ids=CONFIGS)
def test_fault_43_configs(tmp_path, config, match):
    refused(write(tmp_path, config=config), match)


@pytest.mark.parametrize("field", VARIANTS)
def test_fields_that_change_the_forward(tmp_path, field):
    path = write(tmp_path, config={field: VARIANTS[field]})
    refused(path, f"{field}: got .*, expected null, false or empty.*merge_and_unload")


def test_names_are_literal():
    config = adapter_config.AdapterConfig(2, 4, target_modules=("b.c",), rank_pattern={"^b": 3})
    assert config.targets("b.c") and config.targets("a.b.c")
    assert not any(map(config.targets, ("bxc", "ab.c", "a.b.c.d", "c")))
    assert (config.rank_of("b"), config.rank_of("a.b")) == (3, 2)


BIG = 1 << 40
TENSOR_FILES = {
    "empty": (b"", "header: got a file of 0 bytes, expected a safetensors file"),
    "seven bytes": (b"1234567", "header: got a file of 7 bytes"),
    "a header beyond the file": (struct.pack("<Q", 100) + b"{}", "a header of 2 to 2 bytes"),
    "a header beyond the limit": (
        struct.pack("<Q", (16 << 20) + 1) + b"{}", "header: got 16777217 bytes"
    ),
    "a header beyond the limit of a large file": (
        struct.pack("<Q", (16 << 20) + 1) + bytes((16 << 20) + 8), "to 16777216 bytes"
    ),
    "no JSON": (with_header(b"{" * 10), "header: got JSONDecodeError"),
    "no object": (with_header(b"[1]"), "header: got list, expected a JSON object"),
    "no tensors": (with_header(b"{}", 0), "got 0 tensors, expected 1 to 50000"),
    "too many tensors": (
        with_header(json.dumps({f"t{i}": {} for i in range(50_003)}).encode()),
        "got 50004 objects, .* 50000 tensors",
    ),
    "too many values": (with_header(b"[" + b"0," * 400_100 + b"0]"), "400100 commas"),
    "deep": (with_header(b"[" * 100_000), "header: got RecursionError"),
    "a duplicate key": (
        with_header(b'{"a": {}, "a": {}}'), "duplicate key 'a', expected a JSON object"
    ),
    "metadata": (file({"__metadata__": {"a": 1}}), "__metadata__: got .* object of str"),
    "a name": (file({"a b": entry([0, 1], 0, 0)}), f"got 'a b', expected {NAME}"),
    "no dtype": (file({A: dict(shape=[2, 4], data_offsets=[0, 32])}),
                 "dtype, shape and data_offsets alone"),
    "one more field": (file({A: entry([2, 4], 0, 32) | {"x": 1}}), "offsets alone"),
    "an entry that is no object": (file({A: 1}), "lora_A.weight: got 1, expected"),
    "int8": (file({A: entry([2, 4], 0, 8, "I8")}), "got 'I8', expected dtype F16"),
    "a dtype that is a list": (file({A: entry([2, 4], 0, 8, [])}), r"got \[\], "),
    "one dimension": (file({A: entry([8], 0, 32)}), r"shape \[rows, columns\]"),
    "three": (file({A: entry([2, 2, 2], 0, 32)}), r"got \[2, 2, 2\], expected"),
    "a negative size": (file({A: entry([-2, -4], 0, 32)}), "integers >= 0"),
    "a bool size": (file({A: entry([True, 8], 0, 32)}), "integers >= 0"),
    "a float size": (file({A: entry([2.0, 4], 0, 32)}), "integers >= 0"),
    "a product beyond 64 bits": (
        file({A: entry([BIG, BIG], 0, 32)}), "got 32 bytes, expected 4835"
    ),
    "a size beyond 64 bits": (file({A: entry([1 << 64, 0], 0, 0)}), "integers >="),
    "offsets backwards": (file({A: entry([2, 4], 32, 0)}), "got -32 bytes"),
    "offsets of another size": (file({A: entry([2, 4], 0, 28)}), "expected 32 byt"),
    "offsets of a larger size": (
        file({A: entry([2, 4], 0, 36), B: entry([3, 2], 36, 60)}, 60), "36 bytes, expected 32"
    ),
    "a hole": (file({B: entry([3, 2], 36, 60)}, 60), "got 36, .*data_offsets from 32"),
    "an overlap": (file({B: entry([3, 2], 28, 52)}, 52), "got 28, expected"),
    "truncated": (file(payload=55), "got 55 bytes of tensors, expected 56 by the header"),
    "padded": (file(payload=57), "got 57 bytes of tensors, expected 56 by the header"),
    "an unknown key": (
        file({"lin.weight": entry([1, 0], 56, 56)}),
        "got 'lin.weight', expected MODULE.lora_A.weight or MODULE.lora_B.weight; merge",
    ),
    "DoRA": (
        file({"lin.lora_magnitude_vector": entry([1, 0], 56, 56)}),
        "got 'lin.lora_magnitude_vector', expected MODULE",
    ),
    "no module": (file({".lora_A.weight": entry([1, 0], 56, 56)}), "got '.lora_A"),
    "one tensor twice": (
        file({"lin.lora_A.weight": entry([2, 0], 56, 56)}),
        "lin.lora_A.weight: got a duplicate, expected one tensor a name",
    ),
    "no partner": (
        file({B: None}, 32), "lora_A.weight: got no partner, expected both"
    ),
    "not targeted": (
        file({"x.lora_A.weight": entry([2, 0], 56, 56)}),
        "x.lora_A.weight: got 'x', expected a module of target_modules",
    ),
    "rank of A": (
        file({A: entry([1, 8], 0, 32)}), r"A.weight: got \[1, 8\], .* with r=2"
    ),
    "rank of B": (
        file({B: entry([2, 3], 32, 56)}), r"B.weight: got \[2, 3\], .* with r=2"
    ),
    "K of another model": (
        file({A: entry([2, 5], 0, 40), B: entry([3, 2], 40, 64)}, 64),
        r"lin: got lora_A \[2, 5\], lora_B \[3, 2\], expected \[2, 4\] and \[3, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("data, match", TENSOR_FILES.values(), ids=TENSOR_FILES)
def test_fault_43_tensor_files(tmp_path, data, match):
    refused(write(tmp_path, data), match)


def test_modules_that_are_not_there_or_no_linear(tmp_path):
    there = "got a name, expected a module of the model"
    linear = "got torch.nn.*Embedding, expected a plain nn.Linear"
    for name, match in (("other", there), ("embed", linear)):
        fields = {key.replace("lin", name): value for key, value in header().items()}
        data = with_header(json.dumps(fields).encode())
        path = write(tmp_path, data, dict(target_modules=[name]))
        refused(path, f"base_model.model.{name}: {match}")


def test_layers_of_the_model(tmp_path):
    path = write(tmp_path)
    wide = nn.ModuleDict({"lin": lk.LoRALinear(4, 3, 3)})
    with pytest.raises(lk.AdapterError, match="got r=2, expected the layer's r=3; build the layer"):
        lk.load_adapter(wide, path)
    more = nn.ModuleDict({"lin": nn.Linear(4, 3), "more": lk.LoRALinear(4, 3, 2)})
    with pytest.raises(lk.AdapterError, match="more: got nothing, expected its lora_A and lora_B"):
        lk.load_adapter(more, path)
    assert type(more["lin"]) is nn.Linear


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e6])
def test_values(tmp_path, value):
    a = torch.full((2, 4), value).numpy().tobytes()
    data = file()[:-56] + a + bytes(24)
    path = write(tmp_path, data)
    if value != 1e6:
        refused(path, "lin.lora_A.weight: got Inf or NaN, expected finite values")
    half = nn.ModuleDict({"lin": lk.LoRALinear(4, 3, 2, dtype=torch.float16)})
    match = "got a value beyond its range, expected torch.float16" if value == 1e6 else "Inf or NaN"
    with pytest.raises(lk.AdapterError, match=match):
        lk.load_adapter(half, path)
    assert half["lin"].lora_a.isfinite().all()


# ---- files and paths -----------------------------------------------------------------------------


class Trap:
    """Unpickling it would end the test run."""

    def __reduce__(self):
        return os._exit, (13,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.ckpt"])
def test_fault_43_pickle_is_refused_unread(tmp_path, name):
    file = write(tmp_path) / name
    file.write_bytes(pickle.dumps(Trap()))
    lk.load_adapter(model(), tmp_path)  # beside safetensors it is not looked at
    (tmp_path / TENSORS).unlink()
    match = f"{name}: got a pickle, expected adapter_model.safetensors; unpickling runs"
    refused(tmp_path, match)
    refused(file, match)


def test_fault_43_paths(tmp_path):
    path = tmp_path / "adapter"
    refused(path, "got nothing there, expected a directory; download it first")
    path.mkdir()
    refused(path, f"{CONFIG}: got nothing there, expected a file")
    write(path)
    refused(path / TENSORS, "got a file, expected a directory; give the directory that holds")
    (path / TENSORS).unlink()
    refused(path, f"{TENSORS}: got nothing there, expected a file")
    (path / TENSORS).mkdir()
    refused(path, "got no regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "got no regular file")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_fault_43_links_stay_inside(tmp_path, name):
    outside, path = tmp_path / "outside", tmp_path / "adapter"
    outside.mkdir(), path.mkdir()
    write(outside), write(path)
    (path / name).rename(path / "inside")
    (path / name).symlink_to("inside")
    lk.load_adapter(model(), path)
    (path / name).unlink()
    (path / name).symlink_to(outside / name)
    refused(path, f"{name}: got a link out of the directory, .*snapshot_download")
    (path / name).unlink()
    (path / name).symlink_to(name)
    refused(path, f"{name}: got nothing there")
    (tmp_path / "link").symlink_to(outside)  # the directory itself may be one
    lk.load_adapter(model(), tmp_path / "link")


def test_the_size_limit_is_the_callers(tmp_path):
    path = write(tmp_path)
    size = (path / TENSORS).stat().st_size
    lk.load_adapter(model(), path, max_bytes=size)
    refused(path, f"got {size} bytes, expected at most max_bytes={size - 1}", max_bytes=size - 1)


def test_a_file_that_lies_about_its_size_is_not_read(tmp_path):
    """8 GiB on paper: refused by its size, and below the limit by its header alone."""
    path = write(tmp_path)
    with (path / TENSORS).open("r+b") as stream:
        stream.truncate(8 << 30)
    tracemalloc.start()
    refused(path, "expected at most max_bytes=4294967296; raise max_bytes")
    refused(path, "bytes of tensors, expected 56 by the header", max_bytes=1 << 40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_after_the_check(tmp_path, monkeypatch, change):
    wide = {A: entry([2, 9000], 0, 72000), B: entry([3, 2], 72000, 72024)}
    path = write(tmp_path, file(wide, 72024))
    size = (path / TENSORS).stat().st_size

    def entries(*args):
        os.truncate(path / TENSORS, size + change)
        return found(*args)

    found = adapter_tensors.entries
    monkeypatch.setattr(adapter_tensors, "entries", entries)
    refused(
        path, f"got {size + change} bytes, expected {size}, as when it was opened; load it again"
    )


def test_safetensors_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(
        write(tmp_path), r"pip install safetensors \(or lora-kernels\[adapters\]\)", ImportError
    )

"""adapter_model.safetensors: the header is checked in full before a byte of a tensor is read.

Layout: 8 bytes, the header's length, little endian; the header, a JSON object of name -> dtype,
shape, data_offsets; the tensors, without a hole. Names are [base_model.model.]MODULE.lora_A.weight
and .lora_B.weight, A [r, K] and B [N, r].
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .adapter_config import (
    MAX_NAME_LENGTH,
    AdapterConfig,
    AdapterError,
    Plain,
    is_name,
    name_rule,
    parse_json,
    short,
)  # fmt: skip

MAX_BYTES = 4 << 30  # of the file, unless the caller says otherwise
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000
PREFIX = "base_model.model."
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PARTS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
AGAIN = "save the adapter again with save_pretrained or lora_kernels.save_adapter"


class Entry(NamedTuple):
    """One tensor of a header."""

    key: str  # as in the file
    dtype: torch.dtype
    shape: tuple[int, int]
    begin: int  # bytes behind the header
    end: int


Pair = dict[str, Entry]  # "a" and "b" of one module


def read_tensors(
    file: Path, config: AdapterConfig, max_bytes: int = MAX_BYTES, check_finite: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} of a safetensors file, in memory of their own, on the CPU.

    Raises:
        AdapterError: the file is larger than `max_bytes`, no adapter of `config`, or, with
            `check_finite`, holds an Inf or NaN.
        ImportError: safetensors is not installed.
    """
    _library()
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            got, expected = Plain(f"{size} bytes"), f"at most max_bytes={max_bytes}"
            raise AdapterError(file, "", got, expected, "raise max_bytes if you trust the file")
        head = read_head(stream, size, file)
        pairs = pairs_of(entries(head[8:], size - len(head), file), config, file)
        data = head + stream.read(size - len(head) + 1)
    if len(data) != size:
        got, expected = Plain(f"{len(data)} bytes"), f"{size}, as when it was opened"
        raise AdapterError(file, "", got, expected, "load it again once it is written")
    return _tensors(data, pairs, file, check_finite)


def read_head(stream: BinaryIO, size: int, file: object) -> bytes:
    """The length and the header, at most 8 + MAX_HEADER_BYTES bytes."""
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, size - 8)
    if len(prefix) < 8 or not 2 <= length <= limit:
        got = Plain(f"{length} bytes" if len(prefix) == 8 else f"a file of {size} bytes")
        expected = f"a header of 2 to {limit} bytes" if size >= 10 else "a safetensors file"
        raise AdapterError(file, "header", got, expected, AGAIN)
    return prefix + stream.read(length)


def entries(header: bytes, payload: int, file: object) -> list[Entry]:
    """The tensors of a header of a file with `payload` bytes behind it, in the file's order.

    Raises:
        AdapterError: a malformed entry, or tensors with a hole, an overlap or another end.
    """
    braces = header.count(b"{")  # bounds what the parser builds, before it does
    if braces > MAX_TENSORS + 2 or header.count(b",") > 8 * (MAX_TENSORS + 2):
        got = Plain(f"{braces} objects, {header.count(b',')} commas")
        raise AdapterError(file, "header", got, f"at most {MAX_TENSORS} tensors", AGAIN)
    fields = parse_json(header, file, MAX_HEADER_BYTES, "header")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(file, "__metadata__", metadata, "an object of strings", AGAIN)
    if not 1 <= len(fields) <= MAX_TENSORS:
        got = Plain(f"{len(fields)} tensors")
        raise AdapterError(file, "header", got, f"1 to {MAX_TENSORS}", AGAIN)
    found = [_entry(key, value, file) for key, value in fields.items()]
    found.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in found:
        if entry.begin != at:
            raise AdapterError(
                file, short(entry.key), entry.begin, f"data_offsets from {at}", AGAIN
            )
        at = entry.end
    if at != payload:
        got = Plain(f"{payload} bytes of tensors")
        raise AdapterError(file, "", got, f"{at} by the header: truncated or padded", AGAIN)
    return found


def _entry(key: str, value: Any, file: object) -> Entry:
    if not is_name(key):
        raise AdapterError(file, "header", key, name_rule(), AGAIN)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(file, key, value, "dtype, shape and data_offsets alone", AGAIN)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        remedy = "convert it to one of them"
        raise AdapterError(file, key, value["dtype"], f"dtype {', '.join(DTYPES)}", remedy)
    for name, what in (("shape", "[rows, columns]"), ("data_offsets", "[begin, end]")):
        got = value[name]
        if not isinstance(got, list) or len(got) != 2 or not all(map(_is_size, got)):
            raise AdapterError(file, key, got, f"{name} {what}, integers >= 0", AGAIN)
    (rows, columns), (begin, end) = value["shape"], value["data_offsets"]
    size = rows * columns * dtype.itemsize
    if end - begin != size:
        expected = f"{size} bytes for its shape and dtype"
        raise AdapterError(file, key, Plain(f"{end - begin} bytes"), expected, AGAIN)
    return Entry(key, dtype, (rows, columns), begin, end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def pairs_of(found: list[Entry], config: AdapterConfig, file: object) -> dict[str, Pair]:
    """{module: its A and B}, each of the config's rank and among its targets."""
    pairs: dict[str, Pair] = {}
    for entry in found:
        name = entry.key.removeprefix(PREFIX)
        part = next((part for part in PARTS if name.endswith(part)), None)
        if part is None or name == part:
            expected = f"MODULE{' or MODULE'.join(PARTS)}"
            remedy = "merge what is no plain LoRA into the base model with PEFT's merge_and_unload"
            raise AdapterError(file, "header", entry.key, expected, remedy)
        pair = pairs.setdefault(name.removesuffix(part), {})
        if PARTS[part] in pair:
            remedy = "delete one of them"
            raise AdapterError(file, entry.key, Plain("a duplicate"), "one tensor a name", remedy)
        pair[PARTS[part]] = entry
    for module, pair in pairs.items():
        _check_pair(module, pair, config, file)
    return pairs


def _check_pair(module: str, pair: Pair, config: AdapterConfig, file: object) -> None:
    if not config.targets(module):
        remedy = "name it in adapter_config.json"
        expected = "a module of target_modules"
        raise AdapterError(file, next(iter(pair.values())).key, module, expected, remedy)
    if len(pair) != 2:
        (entry,) = pair.values()
        raise AdapterError(file, entry.key, Plain("no partner"), "both lora_A and lora_B", AGAIN)
    r = config.rank_of(module)
    a, b = pair["a"], pair["b"]
    remedy = "set r or rank_pattern in adapter_config.json to the rows of lora_A"
    if a.shape[0] != r:
        raise AdapterError(file, a.key, list(a.shape), f"shape [r, K] with r={r}", remedy)
    if b.shape[1] != r:
        raise AdapterError(file, b.key, list(b.shape), f"shape [N, r] with r={r}", remedy)


def _tensors(
    data: bytes, pairs: dict[str, Pair], file: object, check_finite: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    from safetensors import SafetensorError

    try:
        loaded = _library().load(data)
    except SafetensorError as error:
        reason = Plain(short(Plain(error)))
        raise AdapterError(file, "", reason, "a safetensors file", AGAIN) from None

    def tensor_of(entry: Entry) -> Tensor:
        tensor = loaded.pop(entry.key).clone()
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            got = Plain(f"{tensor.dtype} {list(tensor.shape)}")
            raise AdapterError(file, entry.key, got, f"{entry.dtype} {list(entry.shape)}", AGAIN)
        if check_finite and not bool(torch.isfinite(tensor).all()):
            remedy = "the training diverged; check_finite=False loads it all the same"
            raise AdapterError(file, entry.key, Plain("Inf or NaN"), "finite values", remedy)
        return tensor

    return {module: (tensor_of(pair["a"]), tensor_of(pair["b"])) for module, pair in pairs.items()}


def write_tensors(file: Path, tensors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """{module: (A, B)} under PEFT's names, each in memory of its own."""
    save_file = _library().save_file
    named = {}
    for module, (a, b) in tensors.items():
        for part, tensor in zip(PARTS, (a, b), strict=True):
            key = f"{PREFIX}{module}{part}"
            if not is_name(key):
                remedy = f"rename the module; {MAX_NAME_LENGTH} characters are the limit"
                raise AdapterError(file, "", key, name_rule(), remedy)
            if tensor.dtype not in DTYPES.values():
                expected = f"dtype {', '.join(DTYPES)}"
                raise AdapterError(file, key, tensor.dtype, expected, "convert the adapters first")
            named[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    save_file(named, file, metadata={"format": "pt"})


def _library():
    try:
        import safetensors.torch
    except ImportError:
        remedy = "pip install safetensors (or lora-kernels[adapters])"
        raise ImportError(f"adapter files need safetensors, which is missing: {remedy}") from None
    return safetensors.torch

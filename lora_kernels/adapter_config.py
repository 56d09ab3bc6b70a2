"""adapter_config.json of PEFT's LoRA, as a file from a stranger: every field checked or refused.

A field that would change the forward beyond scaling · B·A is refused by its name. Names in it are
taken literally: none is ever compiled as a regular expression, imported or downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_RANK = 4096
MAX_NAMES = 50_000  # in target_modules and in each pattern
MAX_NAME_LENGTH = 512
NAME = re.compile(r"[A-Za-z0-9_.\-]+")

# They say how the adapter was made, or what PEFT does with it beside the forward.
INERT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config lora_ga_config
    megatron_core peft_version qalora_group_size revision runtime_config task_type
    """.split()  # noqa: SIM905
)
READ = frozenset(
    """
    alpha_pattern bias init_lora_weights lora_alpha lora_dropout peft_type r rank_pattern
    target_modules use_rslora
    """.split()  # noqa: SIM905
)
# Initialisations that leave the base weight as it is.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterError(ValueError):
    """An adapter that cannot be read, written or put into a model.

    The message names the file, the key in it, what was got, what was expected, and a remedy.
    """

    def __init__(self, file: object, key: str, got: object, expected: str, remedy: str):
        where = f"{file}: {key}" if key else f"{file}"
        super().__init__(f"{where}: got {short(got)}, expected {expected}; {remedy}")


def short(got: object, limit: int = 80) -> str:
    """A repr that cannot flood a log: a file's content never goes further than this."""
    text = got if isinstance(got, Plain) else repr(got[:limit] if isinstance(got, str) else got)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Plain(str):
    """Words of ours in an error's `got`, not quoted there."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a PEFT LoRA config says about the forward. Patterns map a literal module suffix."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return _of_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        return _of_pattern(self.alpha_pattern, module, self.lora_alpha)

    def targets(self, module: str) -> bool:
        """Whether a suffix of `target_modules` names this module."""
        return any(has_suffix(module, suffix) for suffix in self.target_modules)


def has_suffix(module: str, suffix: str) -> bool:
    """Whole name or its last components, as PEFT matches a list of target_modules."""
    return module == suffix or module.endswith("." + suffix)


def _of_pattern(pattern: dict[str, Any], module: str, default):
    for key, value in pattern.items():  # the first that matches, as in PEFT
        if module == key[1:] if key.startswith("^") else has_suffix(module, key):
            return value
    return default


def parse_config(data: bytes, file: object) -> AdapterConfig:
    """The config in the bytes of `file`.

    Raises:
        AdapterError: not JSON, too large or too deep, or what `check_config` refuses.
    """
    fields = parse_json(data, file, MAX_CONFIG_BYTES)
    if (depth := _depth(fields)) > MAX_CONFIG_DEPTH:
        got = Plain(f"{depth} levels")
        raise AdapterError(file, "", got, f"at most {MAX_CONFIG_DEPTH}", "it is no adapter's")
    return check_config(fields, file)


def check_config(fields: dict[str, Any], file: object) -> AdapterConfig:
    """The config that these fields say.

    Raises:
        AdapterError: a value out of range, or a field that asks for a forward other than LoRA's.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterError(file, "peft_type", kind, "'LORA'", "load other adapters with PEFT")
    _refuse_variants(fields, file)
    return AdapterConfig(
        _rank(fields.get("r"), file, "r"),
        _number(fields.get("lora_alpha"), file, "lora_alpha"),
        _dropout(fields.get("lora_dropout", 0.0), file),
        _flag(fields.get("use_rslora", False), file, "use_rslora"),
        _targets(fields.get("target_modules"), file),
        _pattern(fields.get("rank_pattern"), file, "rank_pattern", _rank),
        _pattern(fields.get("alpha_pattern"), file, "alpha_pattern", _number),
    )


def parse_json(data: bytes, file: object, max_bytes: int, key: str = "") -> dict[str, Any]:
    """The JSON object in `data`, without duplicate keys, at any depth, and without NaN."""
    if len(data) > max_bytes:
        got = Plain(f"{len(data)} bytes")
        raise AdapterError(file, key, got, f"at most {max_bytes}", "it is no adapter's")
    remedy = "save the adapter again with save_pretrained or lora_kernels.save_adapter"
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits is a ValueError too
        reason = Plain(f"{type(error).__name__}: {short(Plain(error), 60)}")
        raise AdapterError(file, key, reason, "a JSON object", remedy) from None
    if not isinstance(fields, dict):
        raise AdapterError(file, key, Plain(type(fields).__name__), "a JSON object", remedy)
    return fields


def _depth(value: object) -> int:
    """Levels of objects and lists. The parser itself stops at Python's recursion limit."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [v for each in level for v in (each.values() if isinstance(each, dict) else each)]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {short(name, 40)}")
        found[name] = value
    return found


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _refuse_variants(fields: dict[str, Any], file: object) -> None:
    merge = "merge it into the base model with PEFT's merge_and_unload"
    for name, value in fields.items():
        if name in INERT or name in READ or not value:
            continue
        expected = "null, false or empty: lora_kernels computes plain LoRA"
        raise AdapterError(file, name, value, expected, merge)
    if fields.get("bias", "none") != "none":
        raise AdapterError(file, "bias", fields["bias"], "'none': the bias is frozen", merge)
    init = fields.get("init_lora_weights")
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in PLAIN_INITS):
        names = ", ".join(map(repr, PLAIN_INITS))
        remedy = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        expected = f"one of {names}: others change the base weight"
        raise AdapterError(file, "init_lora_weights", init, expected, remedy)


def _rank(value: object, file: object, key: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        expected = f"an integer in 1..{MAX_RANK}"
        raise AdapterError(file, key, value, expected, "set it to the rows of lora_A")
    return value


def _number(value: object, file: object, key: str) -> float:
    try:
        finite = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite:
        raise AdapterError(file, key, value, "a finite number", "set it as in training")
    return value  # type: ignore[return-value]


def _dropout(value: object, file: object) -> float:
    p = _number(value, file, "lora_dropout")
    if not 0 <= p < 1:
        remedy = "set 0 to run the adapter without dropout"
        raise AdapterError(file, "lora_dropout", value, "a number in [0, 1)", remedy)
    return float(p)


def _flag(value: object, file: object, key: str) -> bool:
    if type(value) is not bool:
        raise AdapterError(file, key, value, "true or false", "set it as in training")
    return value


def _targets(value: object, file: object) -> tuple[str, ...]:
    remedy = 'list the suffixes of the modules that the tensor file names, such as ["q_proj"]'
    if not isinstance(value, list) or not value or len(value) > MAX_NAMES:
        got = Plain(f"a list of {len(value)}") if isinstance(value, list) else value
        expected = f"a list of 1 to {MAX_NAMES} module names (a regular expression is never run)"
        raise AdapterError(file, "target_modules", got, expected, remedy)
    for name in value:
        if not is_name(name):
            raise AdapterError(file, "target_modules", name, name_rule(), remedy)
    return tuple(value)


def _pattern(value: object, file: object, key: str, check) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        got = Plain(f"{len(value)} entries") if isinstance(value, dict) else value
        expected = f"an object of at most {MAX_NAMES} entries"
        raise AdapterError(file, key, got, expected, "save the adapter again")
    for name in value:
        if not is_name(name.removeprefix("^")):
            remedy = "write every module's name out: a regular expression is never run"
            raise AdapterError(file, key, name, name_rule(), remedy)
    return {name: check(got, file, f"{key}[{short(name)}]") for name, got in value.items()}


def is_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= MAX_NAME_LENGTH and bool(NAME.fullmatch(name))


def name_rule() -> str:
    return f"a name of at most {MAX_NAME_LENGTH} characters, {NAME.pattern}"

"""The names that other libraries give a LoRA layer's parameters in a state dict."""

from __future__ import annotations

import re
from typing import Any

# loralib: weight, lora_A; litgpt: linear.weight, lora_A; torchtune: weight, lora_a.weight;
# PEFT: base_layer.weight, lora_A.ADAPTER.weight, in its files lora_A.weight.
_NAMES = {
    "weight": re.compile(r"weight|base_layer\.weight|linear\.weight"),
    "bias": re.compile(r"bias|base_layer\.bias|linear\.bias"),
    "lora_a": re.compile(r"lora_a|lora_A|lora_a\.weight|lora_A\.(?:[^.]+\.)?weight"),
    "lora_b": re.compile(r"lora_b|lora_B|lora_b\.weight|lora_B\.(?:[^.]+\.)?weight"),
}


def rename_keys(state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Renames in place the keys behind `prefix` to a LoRALinear's; returns what is ambiguous.

    Two names for one parameter, such as two adapters of PEFT, stay as they are.
    """
    own = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    problems = []
    for ours, theirs in _NAMES.items():
        found = [key for key in own if theirs.fullmatch(key)]
        if len(found) > 1:
            names = ", ".join(prefix + key for key in found)
            problems.append(
                f"LoRALinear: {names} could each be {prefix}{ours}, expected one of them; "
                "delete the others from the state dict"
            )
        elif found and found[0] != ours:
            state_dict[prefix + ours] = state_dict.pop(prefix + found[0])
    return problems

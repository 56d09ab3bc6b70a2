"""LoRA linear layers at the price of the frozen linear. See `fused_lora_linear`."""

from . import flops, reference
from .adopt import apply, patch_peft, report, unapply, unpatch_peft
from .backend import Backend, backends, use_backend
from .dropout import dropout_mask, keep_probability
from .explanation import Explanation, explain
from .functional import fused_lora_linear
from .group import fused_lora_linear_group
from .linear import LoRALinear

__version__ = "0.1.0"
__all__ = [
    "Backend",
    "Explanation",
    "LoRALinear",
    "apply",
    "backends",
    "dropout_mask",
    "explain",
    "flops",
    "fused_lora_linear",
    "fused_lora_linear_group",
    "keep_probability",
    "patch_peft",
    "reference",
    "report",
    "unapply",
    "unpatch_peft",
    "use_backend",
]

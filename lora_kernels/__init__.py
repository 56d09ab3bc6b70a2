"""LoRA linear layers at the price of the frozen linear. See `fused_lora_linear`."""

from . import flops, reference
from .adapter_config import AdapterError
from .adapter_files import load_adapter, read_adapter, save_adapter
from .adopt import apply, patch_peft, report, unapply, unpatch_peft
from .backend import Backend, backends, use_backend
from .convert import convert_layer, convert_model
from .dropout import dropout_mask, keep_probability
from .explanation import Explanation, explain
from .functional import fused_lora_linear
from .group import fused_lora_linear_group
from .injection import inject
from .linear import LoRALinear

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Backend",
    "Explanation",
    "LoRALinear",
    "apply",
    "backends",
    "convert_layer",
    "convert_model",
    "dropout_mask",
    "explain",
    "flops",
    "fused_lora_linear",
    "fused_lora_linear_group",
    "inject",
    "keep_probability",
    "load_adapter",
    "patch_peft",
    "read_adapter",
    "reference",
    "report",
    "save_adapter",
    "unapply",
    "unpatch_peft",
    "use_backend",
]

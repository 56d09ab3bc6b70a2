"""axolotl's plugin: in its YAML,

plugins:
  - lora_kernels.integrations.axolotl.LoraKernelsPlugin
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin

from ..adopt import apply, report

LOG = logging.getLogger(__name__)


class LoraKernelsPlugin(BasePlugin):
    """Applies lora_kernels to the model once its adapters are there.

    axolotl's own lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel replace the same forwards:
    leave them off.
    """

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """axolotl calls it after get_peft_model or PeftModel.from_pretrained."""
        LOG.info("lora_kernels: %d LoRA layers fused", report(apply(model)).fused)

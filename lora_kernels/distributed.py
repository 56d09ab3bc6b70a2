"""Many GPUs: what torch.distributed needs beyond the op itself.

`fused_lora_linear` and `LoRALinear` take DTensors (`sharded`); `ColwiseLoRA` and `RowwiseLoRA` are
the styles of `parallelize_module` for a LoRALinear; `share_verdicts` gives all ranks the same
automatic choice. Importing this module registers the sharding rules of the bare operators
(`sharding_rules`). DDP and FSDP2 hand the op plain tensors and need none of it: docs/scaling.md.
"""

from __future__ import annotations

import torch.distributed as dist

from .shared_verdicts import share_verdicts

__all__ = ["share_verdicts"]

if dist.is_available():
    from . import sharding_rules
    from .parallel_styles import ColwiseLoRA, RowwiseLoRA
    from .sharded import sharded_lora_linear

    sharding_rules.register()
    __all__ += ["ColwiseLoRA", "RowwiseLoRA", "sharded_lora_linear"]

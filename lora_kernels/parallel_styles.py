"""Tensor parallel styles of a LoRALinear, for torch's `parallelize_module`.

They are to a LoRALinear what ColwiseParallel and RowwiseParallel are to an nn.Linear, with the same
layouts, so both kinds mix in one plan. The adapter is sharded as its weight is (`sharding_rules`):

    ColwiseLoRA   weight, lora_b, bias by rows; lora_a on every rank
    RowwiseLoRA   weight, lora_a by columns; lora_b, bias on every rank
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from .linear import LoRALinear


class _LoRAStyle(ParallelStyle):
    _input: Placement  # what the op takes, and the default of input_layouts
    _output: Placement  # the default of output_layouts
    _shards: dict[str, Placement]  # other parameters are replicated

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts = input_layouts or self._input
        self.output_layouts = output_layouts or self._output
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if not isinstance(module, LoRALinear):
            raise NotImplementedError(
                f"{name}: only lora_kernels.LoRALinear can be sharded, but got "
                f"{type(module).__name__}; an nn.Linear takes torch's ColwiseParallel and "
                "RowwiseParallel"
            )
        if module.merged:
            raise RuntimeError(f"{name}: the layer is merged; call unmerge() first")
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{name}: the mesh must have one dimension, but got {device_mesh}; pass the "
                "dimension of tensor parallelism, as in mesh['tp']"
            )
        return distribute_module(
            module, device_mesh, self._shard, self._prepare_input, self._prepare_output
        )

    def _shard(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, param in list(module.named_parameters(recurse=False)):
            placement = self._shards.get(name, Replicate())
            local = distribute_tensor(param, mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(local, param.requires_grad))

    def _prepare_input(self, module, inputs, mesh):
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [self.input_layouts], run_check=False)
        if x.placements != (self._input,):
            x = x.redistribute(placements=[self._input])
        return x, *inputs[1:]

    def _prepare_output(self, module, y, mesh):
        if y.placements != (self.output_layouts,):
            y = y.redistribute(placements=[self.output_layouts])
        return y.to_local() if self.use_local_output else y

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class ColwiseLoRA(_LoRAStyle):
    """Shards a LoRALinear by output features, as ColwiseParallel shards an nn.Linear.

    Args:
        input_layouts: placement of a plain x, by default Replicate(); another one is gathered.
        output_layouts: placement of y, by default Shard(-1).
        use_local_output: return this rank's part of y and not a DTensor.

    Raises:
        NotImplementedError: the module is not a LoRALinear.
        RuntimeError: it is merged.
        ValueError: the mesh has more dimensions than one.
    """

    _input, _output = Replicate(), Shard(-1)
    _shards = {"weight": Shard(0), "lora_b": Shard(0), "bias": Shard(0)}  # noqa: RUF012


class RowwiseLoRA(_LoRAStyle):
    """Shards a LoRALinear by input features, as RowwiseParallel shards an nn.Linear.

    Args:
        input_layouts: placement of a plain x, by default Shard(-1); another one is redistributed.
        output_layouts: placement of y, by default Replicate(), an all-reduce; Shard(d) is a
            reduce-scatter.
        use_local_output: return this rank's part of y and not a DTensor.

    Raises:
        NotImplementedError: the module is not a LoRALinear.
        RuntimeError: it is merged.
        ValueError: the mesh has more dimensions than one.
    """

    _input, _output = Shard(-1), Replicate()
    _shards = {"weight": Shard(1), "lora_a": Shard(1)}  # noqa: RUF012

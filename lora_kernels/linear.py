"""`LoRALinear`: a frozen nn.Linear with a trainable rank-r update."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .checks import MAX_SCALING
from .functional import fused_lora_linear
from .state_names import rename_keys

_INTEGER: Any = Integral
_REAL: Any = Real


def _is(kind: Any, value: object) -> bool:
    """isinstance, but that True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


class LoRALinear(nn.Module):
    """y = x·weightᵀ + bias + scaling · dropout(x)·lora_aᵀ·lora_bᵀ; only lora_a and lora_b train.

    Args:
        in_features: K.
        out_features: N.
        r: rank, >= 0.
        lora_alpha: scaling = lora_alpha / r; None means lora_alpha = r.
        lora_dropout: drop probability of x in the LoRA term, in training mode only.
        bias: whether there is a frozen bias.
        use_rslora: scaling = lora_alpha / sqrt(r) instead.
        adapter_dtype: dtype of lora_a and lora_b; None means the weight's. float32 adapters on a
            16-bit weight are what PEFT trains by default.
        device, dtype: of the frozen parameters.

    Shapes: weight [N, K], bias [N], lora_a [r, K], lora_b [N, r]; x [..., K] -> [..., N]. lora_a
    starts Kaiming-uniform (PEFT's default), lora_b zero, so a new layer equals the frozen linear.

    Raises:
        ValueError: r < 0, lora_dropout outside [0, 1], or a lora_alpha that is not finite.

    Equivalent to::

        F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, p), lora_a), lora_b)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._take(linear.weight, linear.bias)
        self._attach(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A LoRALinear on the weight and bias of `linear`: the memory is shared, not copied.

        `linear` itself is left as it was, its requires_grad included.

        Raises:
            TypeError: no nn.Linear, or one whose weight is packed or sharded.
            ValueError: as for a new layer.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                "LoRALinear.from_linear: linear must be a torch.nn.Linear, but got "
                f"{type(linear).__name__}"
            )
        found, expected = linear.weight.shape, (linear.out_features, linear.in_features)
        if tuple(found) != expected:
            raise TypeError(
                f"LoRALinear.from_linear: weight must be {list(expected)}, but got "
                f"{linear.weight.dtype} {list(found)}: it looks packed or sharded; dequantise or "
                "unshard it first"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._take(linear.weight, linear.bias)
        self._attach(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
        return self.train(linear.training)

    def _take(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        frozen_bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen_bias)

    def _attach(self, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype) -> None:
        if not _is(_INTEGER, r) or r < 0:
            raise ValueError(f"LoRALinear: r must be >= 0, and an integer, but got {r!r}")
        if not _is(_REAL, lora_dropout) or not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(
                f"LoRALinear: lora_dropout must be in [0, 1], but got {lora_dropout!r}"
            )
        self.r = r
        self.lora_dropout = float(lora_dropout)
        self._scale(r if lora_alpha is None else lora_alpha, use_rslora)
        device, dtype = self.weight.device, adapter_dtype or self.weight.dtype
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self._frozen: list[nn.Parameter] = []  # the weight before merge(), hidden from parameters()
        self.reset_lora_parameters()

    def _scale(self, lora_alpha: float, use_rslora: bool) -> None:
        _check_alpha(lora_alpha)
        r = self.r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = 0.0 if r == 0 else lora_alpha / (math.sqrt(r) if use_rslora else r)

    def reset_lora_parameters(self, init: str = "kaiming_uniform") -> None:
        """lora_b = 0; lora_a Kaiming-uniform with a = sqrt(5), or "gaussian": normal, std 1/r."""
        if init not in ("kaiming_uniform", "gaussian"):
            raise ValueError(
                f"LoRALinear: init must be 'kaiming_uniform' or 'gaussian', but got {init!r}"
            )
        if self.r > 0 and self.in_features > 0:
            if init == "gaussian":
                nn.init.normal_(self.lora_a, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @torch.no_grad()
    def set_adapter(
        self, lora_a: Tensor, lora_b: Tensor, lora_alpha: float, use_rslora: bool = False
    ) -> None:
        """Takes the values of lora_a [r, K] and lora_b [N, r], cast, and their scaling.

        Raises:
            TypeError: lora_a or lora_b is no Tensor.
            ValueError: a shape other than the layer's, or a lora_alpha that is not finite.

        What is refused leaves the layer as it was.
        """
        _check_alpha(lora_alpha)
        for name, held, given in (("lora_a", self.lora_a, lora_a), ("lora_b", self.lora_b, lora_b)):
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"LoRALinear.set_adapter: {name} must be a Tensor, but got "
                    f"{type(given).__name__}"
                )
            if held.shape != given.shape:
                raise ValueError(
                    f"LoRALinear.set_adapter: {name} must have shape {list(held.shape)}, "
                    f"but got {list(given.shape)}"
                )
        lora_a, lora_b = lora_a.to(self.lora_a), lora_b.to(self.lora_b)  # or raises, of meta
        was_merged = self.merged
        self.unmerge()
        self.lora_a.copy_(lora_a)
        self.lora_b.copy_(lora_b)
        self._scale(lora_alpha, use_rslora)
        if was_merged:
            self.merge()

    def forward(self, x: Tensor) -> Tensor:
        if self._frozen:
            return nn.functional.linear(x, self.weight, self.bias)
        return fused_lora_linear(
            x,
            self.weight,
            self.lora_a,
            self.lora_b,
            self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    @property
    def merged(self) -> bool:
        """Whether weight currently holds W0 + scaling · B·A."""
        return bool(self._frozen)

    @torch.no_grad()
    def merge(self) -> None:
        """weight <- W0 + scaling · B·A, in fp32, rounded once. W0 is kept, for an exact `unmerge`.

        While merged, the adapters take no part in forward and get no gradient. state_dict holds W0.
        """
        if self.merged:
            return
        merged: Tensor = self.weight
        if self.scaling != 0:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            delta = self.lora_b.to(wide) @ self.lora_a.to(wide)
            merged = torch.add(self.weight.to(wide), delta, alpha=self.scaling)
        # A parameter of its own: a graph that was recorded before keeps the frozen weight it saved.
        self._frozen = [self.weight]
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """weight <- W0, the same bits as before `merge`."""
        if self.merged:
            self.weight = self._frozen.pop()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for frozen in self._frozen:
            frozen.data = fn(frozen.data)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for frozen in self._frozen:
            destination[prefix + "weight"] = frozen if keep_vars else frozen.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Takes the names of loralib, litgpt, torchtune and PEFT too; none holds the scaling."""
        error_msgs += rename_keys(state_dict, prefix)
        was_merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if was_merged:
            self.merge()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, "
            f"bias={self.bias is not None}" + (", merged" if self.merged else "")
        )


def _check_alpha(lora_alpha: float) -> None:
    if not _is(_REAL, lora_alpha) or not abs(lora_alpha) <= MAX_SCALING:
        raise ValueError(
            "LoRALinear: lora_alpha must be finite and at most 2**112 in magnitude, but got "
            f"{lora_alpha!r}"
        )

"""The options of a linear head: how the product x·Wᵀ becomes a logit.

One small dataclass that every backend receives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """With a = x·Wᵀ + bias: z = softcap·tanh(logit_scale·a / softcap) / temperature, or logit_scale·a / temperature."""

    logit_scale: float = 1.0  # Cohere multiplies by it, Granite divides by its inverse
    softcap: float | None = None  # Gemma 2's final_logit_softcapping
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require("logit_scale", self.logit_scale, "a finite number other than 0", lambda value: value != 0)
        _require("temperature", self.temperature, "a finite number above 0", lambda value: value > 0)
        if self.softcap is not None:
            _require("softcap", self.softcap, "a finite number above 0, or None", lambda value: value > 0)

    def logits_(self, a: Tensor) -> Tensor:
        """Turn `a` [..., V] (products plus bias) into logits z, in place."""
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            return a if scale == 1.0 else a.mul_(scale)
        return a.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def times_slope_(self, grad: Tensor, z: Tensor) -> Tensor:
        """Multiply `grad` [..., V] by dz/da in place; `z` holds the logits and is overwritten."""
        scale = self.logit_scale / self.temperature
        if self.softcap is not None:  # 1 - tanh², with tanh read back from z
            z.mul_(self.temperature / self.softcap).clamp_(-1.0, 1.0).square_().neg_().add_(1.0)
            grad.mul_(z)
        return grad if scale == 1.0 else grad.mul_(scale)


def _require(name: str, value: float, wanted: str, holds: Callable[[float], bool]) -> None:
    # math.isfinite would end torch.compile's graph where the number is a symbol
    if not (isinstance(value, (int, float)) and -math.inf < value < math.inf and holds(value)):
        raise ValueError(f"{name}: was {value!r}, must be {wanted}")


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of products and of log-probs: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Bytes of weights that bitsandbytes has quantised: frozen linear layers of the body, not embeddings nor head.

Four bits are half a byte a weight and one float32 scale for 64 weights; with double quantisation the scales are 8 bits
with a float32 of their own for 256 of them. Eight bits are a byte a weight and a float32 for each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

BLOCK, SCALES = 64, 256  # weights that share a scale; scales that share a scale


def quantised_weights(body: nn.Module, settings: Mapping[str, Any] | None) -> dict[str, int]:
    """Bytes by name of the body's weights that are quantised; {} without `settings`."""
    if settings is None:
        return {}
    linear = {name: m for name, m in body.named_modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    return {f"{name}.weight": bytes_of(m, settings) for name, m in linear.items()}


def bytes_of(linear: nn.Linear, settings: Mapping[str, Any]) -> int:
    """Bytes of one linear layer's weight with `bits` 4 or 8, and `double` quantisation of the scales."""
    numbers = linear.weight.numel()
    if int(settings.get("bits", 4)) == 8:
        return numbers + 4 * linear.out_features
    scales = -(-numbers // BLOCK)
    of_scales = scales + 4 * -(-scales // SCALES) if settings.get("double", True) else 4 * scales
    return -(-numbers // 2) + of_scales

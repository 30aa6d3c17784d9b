"""What a stage computes in, where that is not its weights' own dtype: references are scored as Trainer will train.

Without FSDP `bf16: true` is autocast, which rounds the operands of products. FSDP2 rounds every weight when it is
gathered; under autocast the rounded copies of all layers would stay until the backward, which sharding is to avoid.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainingArguments


@dataclass(frozen=True)
class Precision:
    """The dtype, None for that of the weights, and whether the weights themselves are rounded to it."""

    device: torch.device
    dtype: torch.dtype | None = None
    whole: bool = False

    @classmethod
    def of(cls, args: TrainingArguments) -> Precision:
        """That of training with these arguments."""
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of accelerate's launcher
        asked = "bf16" if args.bf16 else "fp16" if args.fp16 else asked
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked)
        return cls(args.device, dtype, dtype is not None and asks_for_fsdp(args))

    @contextmanager
    def computing(self, model: nn.Module) -> Iterator[None]:
        """Compute so with a model that is not sharded; its weights are themselves again afterwards."""
        if not self.whole:
            with self.autocast():
                yield
            return
        kept = [(weight, weight.data) for weight in model.parameters() if weight.is_floating_point()]
        try:
            for weight, data in kept:
                weight.data = data.to(self.dtype)
            yield
        finally:
            for weight, data in kept:
                weight.data = data

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """torch's autocast to the dtype, or nothing."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            yield


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether settings or accelerate's launcher ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

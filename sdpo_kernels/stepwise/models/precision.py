"""The mixed precision of a stage: its references are scored in the precision that Trainer will train in.

Without sharding `bf16: true` means autocast, which rounds the operands of matrix products. FSDP2 instead rounds every
weight when it gathers it: under autocast the rounded copies of all layers would stay in memory until the backward,
which sharding is meant to avoid. DeepSpeed rounds the model's weights too; its optimizer keeps them in float32.
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
    """The dtype to compute in."""

    device: torch.device
    dtype: torch.dtype | None = None  # None: the dtype of the weights
    whole: bool = False  # the weights themselves are rounded to `dtype`, as FSDP2 and DeepSpeed do; False: autocast

    @classmethod
    def of(cls, args: TrainingArguments) -> Precision:
        """The precision of training with these arguments."""
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate's launcher
        asked = "bf16" if args.bf16 else "fp16" if args.fp16 else asked
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked)
        return cls(args.device, dtype, dtype is not None and (asks_for_fsdp(args) or asks_for_deepspeed(args)))

    @contextmanager
    def computing(self, model: nn.Module) -> Iterator[None]:
        """Run an unsharded model in this precision; its own weights are back after the block."""
        if not self.whole:
            with self.autocast():
                yield
            return

        # a model that neither of the two has wrapped yet is rounded here, and restored; its buffers stay as they are
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
        """torch's autocast to the dtype; without one, nothing."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            yield


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether the settings or accelerate's launcher ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_for_deepspeed(args: TrainingArguments) -> bool:
    """Whether the settings or accelerate's launcher ask for DeepSpeed."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"

"""DeepSpeed's ZeRO, besides what Trainer does: refused setups, the weights of its optimizer, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_kernels.integrations.lm_head import find_head
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import PACKED_COLLATORS


def check_zero(trainer: Any) -> None:
    """ValueError for a DeepSpeed setup that would not train as asked."""
    if not trainer.is_deepspeed_enabled or trainer.accelerator.state.deepspeed_plugin.zero_stage != 3:
        return

    # each forward gathers weights from all ranks: one more on one rank would wait for ever
    if trainer.data_collator not in PACKED_COLLATORS:
        raise ValueError(
            "deepspeed: ZeRO-3 needs batching: packed; with padded batches ranks run unequal numbers of forward passes"
        )
    if hasattr(find_head(trainer.model).module, "lora_A"):
        raise ValueError("deepspeed: ZeRO-3 would not gather the head's own LoRA; use ZeRO-2, or no LoRA on the head")


def partition(weight: Tensor) -> Tensor | None:
    """The part of a weight that this rank holds under ZeRO-3; None if the weight is not partitioned."""
    return getattr(weight, "ds_tensor", None)


def optimizer_weights(model: nn.Module, dtype: torch.dtype | None, *, trained_only: bool) -> dict[str, Tensor]:
    """A model's whole weights in CPU memory on rank 0, {} elsewhere; all ranks take part, a weight at a time.

    They are those of DeepSpeed's optimizer: float32, not rounded as the model's own are. With `dtype` they are rounded
    to it once. `trained_only` leaves out buffers and weights that are not trained.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # a tied head is one tensor under two names, and is saved as such
    for name, weight in model.state_dict(keep_vars=True).items():
        if trained_only and not weight.requires_grad:
            continue

        if id(weight) not in seen:
            whole = safe_get_full_fp32_param(weight) if weight.requires_grad else None
            if whole is None:
                with deepspeed.zero.GatheredParameters([weight]):
                    whole = weight.detach().clone()
            seen[id(weight)] = whole.detach().to("cpu", dtype or whole.dtype) if ranks.is_first() else torch.empty(0)
        weights[name] = seen[id(weight)]
    return weights if ranks.is_first() else {}


def require_its_checkpoint(checkpoint: Path) -> None:
    """UserError unless DeepSpeed saved `checkpoint` with as many processes as there are now."""
    saved = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if saved != ranks.world_size():
        raise UserError(
            f"trainer.deepspeed: {checkpoint} was saved with {saved} processes, must be resumed with as many (now "
            f"{ranks.world_size()}): DeepSpeed's optimizer states are divided between them"
        )

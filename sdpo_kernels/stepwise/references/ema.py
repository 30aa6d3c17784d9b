"""A reference that follows the policy while a stage trains: SAPO (arXiv 2405.20830), or TR-DPO with other settings.

    following = EmaReference(model, EmaSettings(decay=0.5, sync_steps=108))
    reference_logps = following.logps(model, batch)      # [2B], in compute_loss
    following.after_step(step)                           # after each optimiser step
    load_ema_into(model, Path("runs/x/stage-1-easy"))    # afterwards: the averaged policy of a finished stage

1. A stage starts with reference = average = policy.
2. After each optimiser step the average moves towards the policy.
3. Every `sync_steps` steps the reference becomes the average (or the policy, with `mode: policy`).

There is still one model. To score the reference, its weights take the policy's place for one forward pass without
gradient: storages are exchanged, so the policy's weights come back untouched. The extra memory is one copy of the
trained weights (the average) and, once the reference has moved, a second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import Batch
from sdpo_kernels.stepwise.settings.reference import EmaSettings

EMA_FILE = "ema.safetensors"  # in a stage's folder: the averaged weights of what was trained
EMA_STATE = "ema_state.safetensors"  # in a checkpoint: the average and, once it has moved, the reference

Weights = dict[str, Tensor]


class EmaReference(TrainerCallback):
    """The moving reference of a stage, a callback of its Trainer: it is updated after each optimiser step."""

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        """`model` is the bare or PEFT model at the stage's start; its trainable parameters are averaged."""
        self.model, self.settings = model, settings
        self.average: Weights = _copies(trained(model))
        self._update_average = get_ema_multi_avg_fn(settings.decay)
        self.reference: Weights | None = None  # None: still the stage's start, which has cached scores

    def logps(self, model: nn.Module, batch: Batch, ld_alpha: float | None = None) -> Tensor:
        """The reference's summed log-probs [2B], chosen first.

        `model` is the module that Trainer calls, so they are computed exactly as the policy's. `ld_alpha` weighs the
        tokens beyond the shorter answer, None for a plain sum. Until the reference first moves, the batch's cached
        scores are returned.
        """
        if self.reference is None:
            return batch.ref_logps

        # eval mode and no gradient, as when the cached scores were made
        was_training = model.training
        model.eval()
        try:
            with swapped(self.model, self.reference), torch.no_grad():
                return batch.logps(model, ld_alpha)
        finally:
            model.train(was_training)

    def after_step(self, step: int) -> None:
        """Update after optimiser step `step` (from 1): average ← decay · average + (1 − decay) · policy, then sync."""
        policy = trained(self.model)
        self._update_average([self.average[name] for name in policy], list(policy.values()), step)

        # a copy, because the average (or the policy) moves on
        period = self.settings.period
        if period is not None and step % period == 0:
            self.reference = _copies(self.average if self.settings.mode == "ema" else policy)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer calls this once per optimiser step, however many batches it accumulates, and before a checkpoint.

        SAPO's code updates its average at the first batch of the next accumulation: the same sequence of averages.
        """
        self.after_step(state.global_step)

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint."""
        state = {f"average.{name}": weight for name, weight in self.average.items()}
        state |= {f"reference.{name}": weight for name, weight in (self.reference or {}).items()}
        _write(state, checkpoint / EMA_STATE)

    def load(self, checkpoint: Path) -> None:
        """Restore the state in a checkpoint."""
        state = load_file(checkpoint / EMA_STATE)
        device = next(iter(self.average.values())).device
        parts: dict[str, Weights] = {"average": {}, "reference": {}}
        for key, weight in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = weight.to(device)

        # a checkpoint saved before the first sync has no reference of its own
        self.average, self.reference = parts["average"], parts["reference"] or None

    def save_average(self, folder: Path) -> None:
        """Write the averaged weights into a stage's folder."""
        _write(self.average, folder / EMA_FILE)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name: all of a full model, the adapter's in a PEFT model."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with `weights` in place of its own of the same names; its own are back, untouched, after the block.

    Storages are exchanged; nothing is copied. Also restored if the block raises.
    """
    own = trained(model)
    kept = {name: own[name].data for name in weights}

    # autocast caches its casts by parameter, not by storage: they would be those of the other weights
    torch.clear_autocast_cache()
    try:
        for name, weight in weights.items():
            own[name].data = weight
        yield
    finally:
        for name, weight in kept.items():
            own[name].data = weight
        torch.clear_autocast_cache()


def load_ema_into(model: nn.Module, stage_folder: Path) -> None:
    """Replace the weights of `model`, loaded from a finished stage by `load_model`, by that stage's averaged ones.

    In a LoRA run that is the run's base with the stage's adapter, and only the adapter is replaced.

    Raises:
        UserError: the folder has no averaged weights, or they do not fit this model.
    """
    path = stage_folder / EMA_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: only stages with reference: ema write one")

    stored, own = load_file(path), dict(model.named_parameters())
    wrong = [name for name, weight in stored.items() if name not in own or own[name].shape != weight.shape]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is missing in the model or has another shape; load the stage's own model")

    with torch.no_grad():
        for name, weight in stored.items():
            own[name].copy_(weight)


def _copies(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)

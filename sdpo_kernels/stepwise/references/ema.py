"""A reference that follows the policy while a stage trains: SAPO (arXiv 2405.20830), or TR-DPO with other settings.

    following = EmaReference(model, EmaSettings(decay=0.5, sync_steps=108))
    reference_logps = following.logps(model, batch)      # [2B], in compute_loss
    following.after_step(step)                           # after each optimiser step
    load_ema_into(model, Path("runs/x/stage-1-easy"))    # afterwards: the averaged policy of a finished stage

1. A stage starts with reference = average = policy.
2. After each optimiser step the average moves towards the policy.
3. Every `sync_steps` steps the reference becomes the average (or the policy, with `mode: policy`).

There is still one model. To score the reference, its weights take the policy's place for one forward pass without
gradient: they are exchanged, so the policy's weights come back untouched. The extra memory is one copy of the trained
weights (the average) and, once the reference has moved, a second one. Of a model that FSDP2 has cut each rank keeps,
averages and exchanges its own shards, and saves them with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdpo_kernels.integrations.cut_weights import is_cut, own, reshard
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import Batch
from sdpo_kernels.stepwise.models.cut_saving import write_pieces
from sdpo_kernels.stepwise.settings.reference import EmaSettings

EMA_FILE = "ema.safetensors"  # in a stage's folder: the averaged weights of what was trained
EMA_SHARDS = "ema_state"  # the same of a cut model: a folder of torch.distributed.checkpoint
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
        reshard(self.model)
        policy = trained(self.model)
        # shards are averaged where they are
        self._update_average([own(self.average[name]) for name in policy], [own(w) for w in policy.values()], step)

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
        """Write the state into a checkpoint; every rank calls it."""
        if is_cut(self.model):
            parts = {"average": self.average} | ({} if self.reference is None else {"reference": self.reference})
            checkpoints.save(parts, storage_writer=checkpoints.FileSystemWriter(checkpoint / EMA_SHARDS))
            return
        if not ranks.is_first():
            return
        state = {f"average.{name}": weight for name, weight in self.average.items()}
        state |= {f"reference.{name}": weight for name, weight in (self.reference or {}).items()}
        _write(state, checkpoint / EMA_STATE)

    def load(self, checkpoint: Path) -> None:
        """Restore the state in a checkpoint; every rank calls it."""
        if is_cut(self.model):
            self._load_shards(checkpoint / EMA_SHARDS)
            return
        state = load_file(checkpoint / EMA_STATE)
        device = next(iter(self.average.values())).device
        parts: dict[str, Weights] = {"average": {}, "reference": {}}
        for key, weight in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = weight.to(device)

        # a checkpoint saved before the first sync has no reference of its own
        self.average, self.reference = parts["average"], parts["reference"] or None

    def _load_shards(self, folder: Path) -> None:
        reader = checkpoints.FileSystemReader(folder)
        moved = any(name.startswith("reference.") for name in reader.read_metadata().state_dict_metadata)
        self.reference = _copies(self.average) if moved else None
        checkpoints.load({"average": self.average}, storage_reader=reader)
        if self.reference is not None:
            checkpoints.load({"reference": self.reference}, storage_reader=reader)

    def save_average(self, folder: Path) -> None:
        """Write the averaged weights into a stage's folder; every rank calls it."""
        if is_cut(self.model):
            write_pieces(self.average, folder / EMA_FILE)
        elif ranks.is_first():
            _write(self.average, folder / EMA_FILE)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name: all of a full model, the adapter's in a PEFT model."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with `weights` in place of its own of the same names; its own are back, untouched, after the block.

    Storages are exchanged; nothing is copied, except for a cut model's shards, one at a time: FSDP2 gathers from where
    they are. Also restored if the block raises.
    """
    if is_cut(model):
        _exchange(model, weights)
        try:
            yield
        finally:
            _exchange(model, weights)
        return

    current = trained(model)
    kept = {name: current[name].data for name in weights}

    # autocast caches its casts by parameter, not by storage: they would be those of the other weights
    torch.clear_autocast_cache()
    try:
        for name, weight in weights.items():
            current[name].data = weight
        yield
    finally:
        for name, weight in kept.items():
            current[name].data = weight
        torch.clear_autocast_cache()


def _exchange(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Exchange the values of a cut model's shards with those of `weights`."""
    reshard(model)  # or gathered weights would stay those of before
    current = trained(model)
    with torch.no_grad():
        for name, weight in weights.items():
            ours, theirs = own(current[name]), own(weight)
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)


def load_ema_into(model: nn.Module, stage_folder: Path) -> None:
    """Replace the weights of `model`, loaded from a finished stage by `load_model`, by that stage's averaged ones.

    In a LoRA run that is the run's base with the stage's adapter, and only the adapter is replaced.

    Raises:
        UserError: the folder has no averaged weights, or they do not fit this model.
    """
    path = stage_folder / EMA_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: only stages with reference: ema write one")

    stored, current = load_file(path), dict(model.named_parameters())
    wrong = [name for name, weight in stored.items() if name not in current or current[name].shape != weight.shape]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is missing in the model or has another shape; load the stage's own model")

    with torch.no_grad():
        for name, weight in stored.items():
            current[name].copy_(weight)


def _copies(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)

"""A reference that follows the policy while a stage trains: SAPO's (arXiv 2405.20830), and TR-DPO's with other numbers.

    following = EmaReference(model, EmaSettings(decay=0.5, sync_steps=108))
    reference_logps = following.logps(model, batch)      # [2B], in compute_loss
    following.after_step(step)                           # after each optimiser step
    load_ema_into(model, Path("runs/x/stage-1-easy"))    # afterwards: the averaged policy of a finished stage

A stage starts with reference = average = policy. After each optimiser step the average moves to the policy, and every
`sync_steps` of them the reference becomes the average (or the policy). There is still one model: the reference's
weights take the policy's place for one forward without gradient, by exchanging storages, and the policy's come back
untouched. Beside it lie one copy of what trains (the average) and, once it has moved, a second (the reference).
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
EMA_STATE = "ema_state.safetensors"  # in a checkpoint: the average and, where it has moved, the reference

Weights = dict[str, Tensor]


class EmaReference(TrainerCallback):
    """The moving reference of a stage; as a callback of its Trainer it moves after each optimiser step."""

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        """`model` is the bare or PEFT model as the stage starts: what of it trains is averaged."""
        self.model, self.settings = model, settings
        self.average: Weights = _copies(trained(model))
        self._move = get_ema_multi_avg_fn(settings.decay)
        self.reference: Weights | None = None  # None: still the stage's start, whose scores are cached

    def logps(self, model: nn.Module, batch: Batch, ld_alpha: float | None = None) -> Tensor:
        """The reference's summed log-probs [2B]; `model` is what Trainer calls, on whose path they are made.

        `ld_alpha` is the loss's weight of tokens beyond the shorter answer, None for none.
        """
        if self.reference is None:
            return batch.ref_logps
        was_training = model.training
        model.eval()
        try:
            with swapped(self.model, self.reference), torch.no_grad():
                return batch.logps(model, ld_alpha)
        finally:
            model.train(was_training)

    def after_step(self, step: int) -> None:
        """Move after optimiser step `step` (from 1): average ← decay · average + (1 − decay) · policy, then sync."""
        policy = trained(self.model)
        self._move([self.average[name] for name in policy], list(policy.values()), step)
        period = self.settings.period
        if period is not None and step % period == 0:
            self.reference = _copies(self.average if self.settings.mode == "ema" else policy)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer calls this once an optimiser step, whatever it accumulates, and before it saves a checkpoint.

        SAPO's code moves its average at the first batch of the next accumulation: the same sequence of averages.
        """
        self.after_step(state.global_step)

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint."""
        state = {f"average.{name}": weight for name, weight in self.average.items()}
        state |= {f"reference.{name}": weight for name, weight in (self.reference or {}).items()}
        _write(state, checkpoint / EMA_STATE)

    def load(self, checkpoint: Path) -> None:
        """Take over the state of a checkpoint."""
        state = load_file(checkpoint / EMA_STATE)
        device = next(iter(self.average.values())).device
        parts: dict[str, Weights] = {"average": {}, "reference": {}}
        for key, weight in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = weight.to(device)
        self.average, self.reference = parts["average"], parts["reference"] or None

    def save_average(self, folder: Path) -> None:
        """Write the averaged weights into a stage's folder."""
        _write(self.average, folder / EMA_FILE)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: all of a full model, the adapter's of a PEFT model."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with `weights` in place of its own of these names; its own come back, untouched, however the block ends.

    Storages change hands and nothing is copied. Casts that an enclosing autocast keeps are of the other weights, so
    they are dropped on both sides.
    """
    own = trained(model)
    kept = {name: own[name].data for name in weights}
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
    """Put the averaged weights of a finished stage into `model`, which must be that stage's as `load_model` loads it.

    Of a LoRA run that is its base with the stage's adapter, and only the adapter is replaced.

    Raises:
        UserError: there are no averaged weights in the folder, or they are not those of this model.
    """
    path = stage_folder / EMA_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: only stages with reference: ema leave one")
    stored, own = load_file(path), dict(model.named_parameters())
    wrong = [name for name, weight in stored.items() if name not in own or own[name].shape != weight.shape]
    if wrong:
        raise UserError(f"{path} holds {wrong[0]}, which the model has not, or in another shape; load the stage's own")
    with torch.no_grad():
        for name, weight in stored.items():
            own[name].copy_(weight)


def _copies(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)

"""How much disk space a run needs, estimated from the model's parameters before training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.units import write_bytes
from sdpo_kernels.stepwise.models.optimizer_states import OptimizerStates
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


@dataclass(frozen=True)
class Space:
    """What a run writes, in bytes."""

    checkpoint: int  # of a stage in progress; while one is saved, the previous one is still there
    finished: int  # a published stage

    @classmethod
    def of(cls, config: RunConfig, model: Any, args: TrainingArguments) -> Space:
        """The space for `model`, which may be on the meta device, with its adapter on it if the run has one."""
        weights = list(model.parameters())
        in_training = [weight for weight in weights if weight.requires_grad]
        trained = sum(w.numel() * w.element_size() for w in in_training)
        states = OptimizerStates.of(str(getattr(args.optim, "value", args.optim))).bytes_of(in_training)
        averages = trained if config.reference == "ema" else 0

        # a checkpoint of a LoRA run has the adapter only; merged weights are float32, and the adapter is next to them
        if not config.publishes_merged:
            finished = trained
        elif config.lora is not None:
            finished = sum(4 * w.numel() for w in weights if not w.requires_grad) + trained
        else:
            finished = sum(w.numel() * w.element_size() for w in weights)
        saved = trained if config.lora is not None else finished
        return cls(int(saved + states + 2 * averages), int(finished + averages))


def check_space(space: Space, folder: Path, stages: int) -> str | None:
    """A warning if two checkpoints and the run's unfinished stages do not fit on the disk of `folder`; otherwise None.

    UserError if not even one checkpoint or finished stage fits. The last stage may need no further checkpoint.
    """
    missing = stages - len(list(folder.glob("stage-*/stage.json")))
    if missing <= 0:
        return None

    free = shutil.disk_usage(_existing(folder)).free
    last_is_saved = missing == 1 and any(folder.glob(".stage-*/checkpoint-*"))
    least = space.finished if last_is_saved else max(space.checkpoint, space.finished)
    whole = 2 * space.checkpoint + missing * space.finished
    needs = (
        f"{write_bytes(free)} are free on the disk of {folder}; a checkpoint takes about "
        f"{write_bytes(space.checkpoint)}, a finished stage {write_bytes(space.finished)}"
    )
    if free < least:
        raise UserError(f"output_dir: {needs}; free some space or choose another output_dir")
    if free < whole:
        return f"output_dir: {needs}; two checkpoints and {missing} stages are {write_bytes(whole)}, more than is free"
    return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())

"""What Trainer does not do, or twice, with models that are divided between ranks: DeepSpeed's, tensor-parallel ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from sdpo_kernels.stepwise.models.tensor_parallel import is_tensor_parallel, load_shards, save_shards


class ShardedModels:
    """A mixin before `transformers.Trainer`.

    With DeepSpeed its own part of a checkpoint has the weights, and Trainer's would be a second copy. Of a
    tensor-parallel model each rank saves its part of the weights and of the optimizer.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    is_deepspeed_enabled: bool

    def __init__(self, **trainer: Any) -> None:
        self.tensor_parallel = is_tensor_parallel(trainer["model"])
        args = trainer["args"]
        asked = args.save_strategy
        if self.tensor_parallel:
            args.save_strategy = SaveStrategy.NO  # Trainer refuses others: by itself it could not resume
        try:
            super().__init__(**trainer)
        finally:
            args.save_strategy = asked

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        if self.tensor_parallel:
            # accelerate would only split the batches by it, which the driver does, and refuses it on CPUs
            args.pop("parallelism_config", None)
        return args

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights in a checkpoint, unless something else does."""
        if not (self.is_deepspeed_enabled or self.tensor_parallel):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.tensor_parallel:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        folder = Path(output_dir)
        folder.mkdir(exist_ok=True)
        save_shards(folder, self.model, self.optimizer, self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer calls this before there is an optimizer; its part of the file is loaded with it
        if not self.tensor_parallel:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.tensor_parallel and checkpoint is not None:
            load_shards(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

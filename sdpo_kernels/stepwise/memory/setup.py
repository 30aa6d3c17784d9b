"""What the memory of a stage depends on besides its model and its pairs: precision, adapter, optimizer, GPUs.

setup = Setup.of(config, args, gpus=8, memory=80 * 2**30)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import TrainingArguments

from sdpo_kernels.stepwise.models.precision import Precision, asks_for_fsdp
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

# settings of the steps around a micro-batch, which change neither the model nor what its layers keep
_OF_STEPS = (
    "checkpointing", "pairs", "accumulation", "scored_pairs", "evaluates", "max_length", "reshards", "syncs_each",
    "follows", "grad_tol", "gpus", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One way to train."""

    dtype: torch.dtype = torch.float32  # of the weights as loaded
    compute: torch.dtype | None = None  # of mixed precision
    lora: LoraSettings | None = None
    quantization: Mapping[str, Any] | None = None  # bits, double, compute_dtype: see `quantised.py`
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    pairs: int = 4  # in a micro-batch of one GPU
    accumulation: int = 1  # micro-batches in a step
    scored_pairs: int = 8  # of a batch that is scored: references and evaluation
    evaluates: bool = False  # while it trains, next to the optimizer's states
    max_length: int = 1024
    gpus: int = 1
    tp: int = 1  # how many of them hold one model together (tp_size)
    sharded: bool = False  # FSDP2
    reshards: bool = True  # a layer's weights are dropped again after its forward
    syncs_each: bool = False  # FSDP2 reduces gradients after each micro-batch, not once a step
    follows: bool = False  # reference: ema
    grad_tol: float = 0.0
    device: str = "cuda"
    memory: int | None = None  # of one GPU, in bytes

    @classmethod
    def of(cls, config: RunConfig, args: TrainingArguments, gpus: int, device: str, memory: int | None) -> Setup:
        """The setup of a stage with these arguments."""
        plugin: Any = args.accelerator_config
        accumulation = plugin.gradient_accumulation_kwargs or {}
        fsdp: Any = args.fsdp_config or {}  # TrainingArguments has made a mapping of it
        return cls(
            dtype=getattr(torch, config.dtype),
            compute=Precision.of(args).dtype,
            lora=config.lora,
            quantization=_section(getattr(config, "quantization", None)),
            checkpointing=_checkpoints(args, fsdp),
            optimizer=str(getattr(args.optim, "value", args.optim)),
            pairs=args.per_device_train_batch_size,
            accumulation=max(args.gradient_accumulation_steps, accumulation.get("num_steps", 1)),
            scored_pairs=args.per_device_eval_batch_size,
            evaluates=str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no",
            max_length=config.max_length,
            gpus=gpus,
            tp=config.tp_size,
            sharded=asks_for_fsdp(args) and gpus > 1,
            reshards=fsdp.get("reshard_after_forward", True) is not False,
            syncs_each=bool(accumulation.get("sync_each_batch", False)),
            follows=config.reference == "ema",
            grad_tol=config.grad_tol,
            device=device,
            memory=memory,
        )

    def of_model(self) -> Setup:
        """What the model's sizes and activations depend on; the rest has its default.

        How large a micro-batch is, the batch says.
        """
        rest: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in _OF_STEPS}
        return replace(self, **rest)

    @property
    def replicas(self) -> int:
        """How many parts a batch is split into."""
        return self.gpus // self.tp

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast rounds to; under FSDP2 the weights themselves are rounded instead."""
        return None if self.sharded else self.compute

    @property
    def body_dtype(self) -> torch.dtype:
        """The dtype of the weights that the body computes with."""
        return (self.compute or self.dtype) if self.sharded else self.dtype


def _checkpoints(args: TrainingArguments, fsdp: Any) -> bool:
    """Whether activations are recomputed; transformers 5.23 renamed the setting, and FSDP has one of its own."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return any(getattr(args, name, False) for name in names) or bool(fsdp.get("activation_checkpointing"))


def _section(settings: Any) -> Mapping[str, Any] | None:
    """A section of run.yaml as a mapping."""
    dump = getattr(settings, "model_dump", None)
    return settings if dump is None else dump()

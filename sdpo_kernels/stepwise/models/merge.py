"""A LoRA adapter merged into its base: the full weights that a finished stage publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sdpo_kernels.stepwise.models.load import pretrained
from sdpo_kernels.stepwise.models.quantized import copy_dequantized
from sdpo_kernels.stepwise.models.saving import is_tied, keep_generation_config, say_untied
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name


def merge_adapter(adapter: Path, config: RunConfig, trained: nn.Module | None = None) -> nn.Module:
    """The run's base in float32 on the CPU with the LoRA adapter in the folder `adapter` merged into it.

    With `quantization` the base's weights are those that `trained` has computed with, dequantised: the adapter has
    learned to make up for their rounding.

    A base whose head is its embedding (a tied head) is untied first if the adapter changes either of the two: merged
    into the one tensor that both share, what was learned for one would change the other too.
    """
    from peft import PeftModel

    base = pretrained(config.model, config, dtype=torch.float32)
    keep_generation_config(base)
    if config.quantization is not None:
        if trained is None:
            raise ValueError("trained: was None, must be the trained model, which has the quantised base")
        copy_dequantized(trained, base)
    if is_tied(base) and _changes_embeddings(base, adapter):
        untie(base)
    merged: Any = PeftModel.from_pretrained(base, str(adapter))
    return merged.merge_and_unload()


def untie(model: Any) -> None:
    """Give the head a copy of the embedding as a weight of its own; the config says so, for whoever loads it."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    say_untied(model.config)

    # transformers collects these when a model is built, and would leave out the head when it saves
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        if getattr(model, name, None):
            setattr(model, name, {})


def _changes_embeddings(model: Any, adapter: Path) -> bool:
    """Whether the adapter has weights for the embedding or the head."""
    ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in ends]
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as stored:
        keys = list(stored.keys())
    return any(f".{name}." in f".{key}" for key in keys for name in names)

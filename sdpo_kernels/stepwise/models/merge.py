"""A LoRA adapter merged into its base: the full weights that a finished stage publishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sdpo_kernels.stepwise.models.cut import bare_name
from sdpo_kernels.stepwise.models.cut_saving import save_pieces
from sdpo_kernels.stepwise.models.load import pretrained
from sdpo_kernels.stepwise.models.quantized import copy_dequantized
from sdpo_kernels.stepwise.models.saving import is_tied, keep_generation_config, say_untied
from sdpo_kernels.stepwise.models.stored import Stored, stand_ins
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


def merge_in_pieces(adapter: Path, config: RunConfig, folder: Path) -> bool:
    """Write what `merge_adapter` makes, with its configs, into `folder`, one weight in memory at a time.

    False, with nothing written, if the base's weights are converted when they are loaded, or the adapter has more than
    LoRA's weights: then all are needed at once.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as file:
        if any(".lora_" not in name for name in file.keys()):  # noqa: SIM118 - not a mapping
            return False
    stored = Stored.of(config.model, config.model_copy(update={"dtype": "float32"}), config.model)
    if stored.converts:
        return False
    base = stored.model
    keep_generation_config(base)
    if is_tied(base) and _changes_embeddings(base, adapter):
        untie(base)
    weights: dict[str, Tensor] = dict(base.named_parameters())
    every = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    weights |= {name: value for name, value in base.state_dict().items() if name not in every}
    with stand_ins(base):
        peft: Any = PeftModel.from_pretrained(base, str(adapter))
    layers = {bare_name(name): module for name, module in peft.named_modules() if isinstance(module, LoraLayer)}

    def merged(name: str, weight: Tensor) -> Iterator[Tensor]:
        module_name, _, kind = name.rpartition(".")
        layer: Any = layers.get(module_name)
        if layer is None or kind != "weight":
            yield stored.whole(name)
            return

        # PEFT's own merge, on a copy of the one weight: tensors of one file may share its memory
        holder = layer.get_base_layer()
        before = holder._parameters["weight"]
        holder._parameters["weight"] = nn.Parameter(stored.whole(name).clone(), requires_grad=False)
        layer.merge()
        yield holder._parameters["weight"].detach()
        holder._parameters["weight"] = before

    base.save_pretrained(folder, state_dict={})  # the configs
    save_pieces(weights, folder, parts_of=merged)
    return True


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

"""The weights of a run's model, built from its config without memory: how many bytes there are, and where.

    sizes, found = measure(model_config, batch, setup)

Parameters are counted exactly: tied ones once, an adapter as PEFT adds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sdpo_kernels.integrations.causal_lm import disable_dropout
from sdpo_kernels.integrations.lm_head import find_head, unwrap
from sdpo_kernels.stepwise.memory.activations import Activations, fake, outermost_layers, trace
from sdpo_kernels.stepwise.memory.batch import MicroBatch
from sdpo_kernels.stepwise.memory.quantised import quantised_weights
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.memory.tensor_parallel import divide, one_part
from sdpo_kernels.stepwise.models.load import Loaded, add_adapter
from sdpo_kernels.stepwise.models.optimizer_states import OptimizerStates


@dataclass(frozen=True)
class LayerSizes:
    """The weights of one decoder layer."""

    numbers: int  # of all weights
    gradients: int  # bytes of the trained ones
    trained: int  # numbers of the trained ones


@dataclass(frozen=True)
class Sizes:
    """The weights of a model, in bytes; with tensor parallelism those of one rank."""

    numbers: int  # how many there are
    trained: int  # how many are trained
    weights: int
    gradients: int  # of the trained weights
    states: int  # of the optimizer
    largest: int  # the largest gradient of one weight
    layers: tuple[LayerSizes, ...]
    head_gradient: int  # 0: the head is frozen
    head_lora: int  # columns of a LoRA on the head, 0: none
    embedding_gradient: int
    head: int  # numbers
    vocabulary: int
    width: int
    head_dtype: torch.dtype
    tied: bool
    unpacked: int  # the largest quantised weight as the products need it


class Measured:
    """A model's measurements, each taken once: to trace 80 layers takes seconds."""

    def __init__(self, model_config: Any, *, trust_remote_code: bool = False) -> None:
        self.model_config, self.trust_remote_code = model_config, trust_remote_code
        self._known: list[tuple[MicroBatch, Setup, tuple[Sizes, Activations]]] = []

    def measure(self, batch: MicroBatch, setup: Setup) -> tuple[Sizes, Activations]:
        """As `measure`; they are not to be changed."""
        needed = setup.of_model()
        for known_batch, known_setup, found in self._known:
            if (known_batch, known_setup) == (batch, needed):
                return found
        found = measure(self.model_config, batch, setup, trust_remote_code=self.trust_remote_code)
        self._known.append((batch, needed, found))
        return found


def measure(
    model_config: Any, batch: MicroBatch, setup: Setup, *, trust_remote_code: bool = False
) -> tuple[Sizes, Activations]:
    """Build the model, count its weights, and trace what `batch` keeps. Raises whatever the model's code raises."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            model_config, dtype=setup.dtype, trust_remote_code=trust_remote_code
        )
    disable_dropout(model)
    if setup.lora is not None:
        loaded = Loaded(model, packed=False, by_sequence=False)
        add_adapter(loaded, setup.lora)
        model = loaded.model
    sizes = _sizes(model, setup)
    with one_part(unwrap(model), setup.tp):
        part = _sizes(model, setup)

    # for the trace the weights are in the dtype that the products see
    with fake():
        _make_fake(model, setup)
        found = trace(unwrap(model.train()), batch, setup.autocast, setup.device)

    # quantised weights are unpacked for each product, and no copy is kept
    if setup.quantization is not None:
        for layer in found.layers:
            layer.copies = layer.cached
    divide(found, sizes, part)
    return part, found


def _make_fake(model: nn.Module, setup: Setup) -> None:
    """Replace weights and buffers on the meta device by fake ones on the CPU, tied ones by one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in made:
                dtype = setup.body_dtype if setup.sharded or not weight.requires_grad else weight.dtype
                made[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=dtype), weight.requires_grad)
            module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _sizes(model: Any, setup: Setup) -> Sizes:
    head = find_head(model)
    packed = quantised_weights(head.body, setup.quantization)
    of_body = {id(weight): packed.get(name, 0) for name, weight in head.body.named_parameters()}
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]

    wide = 4 if (setup.quantization or {}).get("compute_dtype") == "float32" else 2

    # FSDP2 in mixed precision keeps trained weights in float32
    item = 4 if setup.sharded and setup.compute is not None else 0
    base: Any = unwrap(model)
    head_weight, embedding = head._base().weight, base.get_input_embeddings()
    tied = embedding.weight is head_weight
    return Sizes(
        numbers=sum(weight.numel() for weight in weights),
        trained=sum(weight.numel() for weight in trained),
        weights=sum(of_body.get(id(w)) or _bytes([w], item if w.requires_grad else 0) for w in weights),
        gradients=_bytes(trained, item),
        states=OptimizerStates.of(setup.optimizer).bytes_of(_in_float32(trained) if item else trained),
        largest=max((_bytes([weight], item) for weight in trained), default=0),
        layers=tuple(_layer(layer, item) for layer in outermost_layers(head.body)),
        head_gradient=_bytes([head_weight], item) if head_weight.requires_grad else 0,
        head_lora=head.lora_columns,
        embedding_gradient=_bytes([embedding.weight], item) if embedding.weight.requires_grad else 0,
        head=head_weight.numel(),
        vocabulary=head_weight.shape[0],
        width=head_weight.shape[1],
        head_dtype=head_weight.dtype,
        tied=tied,
        unpacked=max((wide * w.numel() for w in weights if of_body.get(id(w))), default=0),
    )


def _layer(layer: nn.Module, item: int) -> LayerSizes:
    weights = list(layer.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    return LayerSizes(
        sum(weight.numel() for weight in weights), _bytes(trained, item), sum(weight.numel() for weight in trained)
    )


def _bytes(weights: Iterable[Tensor], item: int = 0) -> int:
    """Bytes of the weights, with `item` bytes a number if it is not 0."""
    return sum(weight.numel() * (item or weight.element_size()) for weight in weights)


def _in_float32(weights: Iterable[Tensor]) -> list[Tensor]:
    return [weight.float() for weight in weights]

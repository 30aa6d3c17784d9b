"""A base model in 4 or 8 bits (QLoRA), quantised by bitsandbytes as it is loaded.

    options = loading_options(config, device)        # for `from_pretrained`; {} without quantization
    compute_alike(model)                             # scoring and training do the same sums

    copy_dequantized(trained, model)                 # the quantised weights of `trained` into a model that has none

transformers leaves the output head and the embeddings alone, tied or not: the fused head needs a plain weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from sdpo_kernels.integrations.causal_lm import unwrap
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.units import write_part
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

_CLASSES = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes.nn, which is not imported here: it may be missing


def check_quantization(config: RunConfig, model_config: Any) -> None:
    """UserError if bitsandbytes is missing, or if the model's files are quantised already.

    Other formats than bitsandbytes' own are left to transformers if the run asks for no quantization.
    """
    stored = getattr(model_config, "quantization_config", None) or {}
    if stored and (config.quantization is not None or stored.get("quant_method") == "bitsandbytes"):
        raise UserError(
            f"model: {config.model} is stored quantised (quantization_config in its config.json); give the model it "
            "was made from: the setting quantization quantises that as it is loaded"
        )
    if config.quantization is not None and not is_bitsandbytes_available():
        raise UserError("quantization: needs bitsandbytes; run: pip install sdpo-kernels[qlora]")


def quantization_warnings(config: RunConfig, model: nn.Module) -> list[str]:
    """What to know about a quantised base; `model` is as it would be without quantization, and without an adapter."""
    base: Any = unwrap(model)
    ends = {id(part.weight) for part in (base.get_input_embeddings(), base.get_output_embeddings()) if part is not None}
    linear = {id(m.weight) for m in base.modules() if isinstance(m, (nn.Linear, Conv1D))}
    sizes = {id(weight): weight.numel() for weight in base.parameters() if id(weight) not in ends}
    kept = sum(size for key, size in sizes.items() if key not in linear)
    if config.quantization is None or kept <= sum(sizes.values()) / 10:
        return []
    return [
        f"quantization: {write_part(kept, sum(sizes.values()))} weights between embedding and head stay in "
        f"{config.dtype}: only linear layers are quantised, and a mixture's experts are none in this transformers"
    ]


def loading_options(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise the model onto `device`; {} without `quantization`."""
    settings = config.quantization
    if settings is None:
        return {}
    check_quantization(config, None)

    # where it is trained: on a GPU the whole model never is there unquantised
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    if settings.bits == 8:
        return options | {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return options | {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=str(settings.type),
            bnb_4bit_use_double_quant=bool(settings.double),
            bnb_4bit_compute_dtype=getattr(torch, str(settings.compute_dtype)),
        )
    }


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the bare model, layer) of every quantised layer, also of a model with adapters on it."""
    for name, module in unwrap(model).named_modules():
        if type(module).__name__ in _CLASSES and type(module).__module__.startswith("bitsandbytes."):
            yield name.removesuffix(".base_layer"), module


def compute_alike(model: nn.Module) -> None:
    """On the CPU, keep quantised layers in training mode, also in a model that is in eval mode.

    There bitsandbytes computes otherwise in eval mode: activations are quantised too (8 bits), or weights rearranged
    for a kernel without a backward (4 bits, AVX-512-BF16). The policy would not be its own reference, or not train.

    UserError for a layer whose weights bitsandbytes gets wrong on the CPU.
    """
    for name, layer in quantized_layers(model):
        if layer.weight.device.type != "cpu":
            continue

        # its CPU kernel starts a block of 64 weights at every row, its quantiser does not (seen in 0.49 and 0.50)
        if hasattr(layer.weight, "quant_state") and layer.in_features % layer.weight.blocksize:
            raise UserError(
                f"quantization: 4 bits on a CPU need layers whose width is a multiple of {layer.weight.blocksize}, "
                f"because bitsandbytes dequantises others wrongly there; {name} has {layer.in_features}; use bits: 8"
            )
        layer.training = True
        layer.train = MethodType(_stay, layer)


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a layer that stays in training mode."""
    return self


def copy_dequantized(trained: nn.Module, model: nn.Module) -> None:
    """Set the weights of `model`, which is not quantised, to those that the quantised layers of `trained` stand for.

    Taken from the trained model itself: quantised again, on another device, a weight could be rounded otherwise.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    with torch.no_grad():
        for name, layer in quantized_layers(trained):
            target: Any = model.get_submodule(name)
            weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)


def check_adapted(model: nn.Module) -> None:
    """UserError if `modules_to_save` names a linear layer of the body: it would be trained whole, and is quantised.

    `model` is as it would be without quantization.
    """
    from peft.utils import ModulesToSaveWrapper

    base: Any = unwrap(model)
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and module is not head:
            inside = [part for part in module.original_module.modules() if isinstance(part, (nn.Linear, Conv1D))]
            if inside:
                raise UserError(
                    f"lora.modules_to_save: names {name.rpartition('.')[2]}, which quantization quantises and nothing "
                    "can train whole; give it an adapter (target_modules)"
                )

"""The section `quantization:` of run.yaml: a frozen base in 4 or 8 bits, on which `lora` trains an adapter (QLoRA).

quantization: {bits: 4, type: nf4, double: true, compute_dtype: bfloat16}
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.types import Section

# of 4 bits, as in the QLoRA paper; 8 bits have none of these choices
_DEFAULTS = {"type": "nf4", "double": True, "compute_dtype": "bfloat16"}
_SHARDING = ("fsdp", "deepspeed")  # fields of TrainingArguments


class QuantizationSettings(Section):
    """Quantise the base as it is loaded, with bitsandbytes (QLoRA, arXiv 2305.14314). Needs `lora`.

    Embeddings, norms and the output head keep the run's `dtype`.

    Args:
        bits: 4, or 8 (LLM.int8).
        type: How 4 bits are spent: 'nf4' (the default) or 'fp4'.
        double: Whether the scales of the 4-bit blocks are quantised, too; true by default.
        compute_dtype: Data type of the products with 4-bit weights: 'bfloat16' (the default), 'float16' or 'float32'.
    """

    bits: Literal[4, 8] = 4
    type: Literal["nf4", "fp4"] | None = None
    double: bool | None = None
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None

    @model_validator(mode="after")
    def _of_its_bits(self) -> QuantizationSettings:
        if self.bits == 4:
            for name, default in _DEFAULTS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
            return self

        given = {name: getattr(self, name) for name in _DEFAULTS if getattr(self, name) is not None}
        mistakes = [(name, f"was {show(v)}, but only 4 bits have it (bits is 8)") for name, v in given.items()]
        if mistakes:
            raise SettingErrors(mistakes)
        return self

    @property
    def is_low_precision(self) -> bool:
        """Whether products with the quantised weights are rounded to fewer bits than float32 has."""
        return self.compute_dtype != "float32"

    @property
    def text(self) -> str:
        """The settings in words: '4 bits (nf4, double quantisation), products in bfloat16'."""
        if self.bits == 8:
            return "8 bits (LLM.int8)"
        double = ", double quantisation" if self.double else ""
        return f"4 bits ({self.type}{double}), products in {self.compute_dtype}"


def quantization_mistakes(config: Any) -> list[tuple[str, str]]:
    """Settings of a run (a RunConfig) that a quantised base rules out: (key, what it was and must be)."""
    if config.quantization is None:
        return []
    mistakes = []
    if config.lora is None:
        mistakes.append(("lora", "is required with quantization: quantised weights are not trained, an adapter is"))
    elif config.quantization.bits == 8 and config.lora.more.get("use_dora"):
        # PEFT 0.21 with bitsandbytes 0.50, on a CPU; there is no GPU to try it on
        text = "was true with bits: 8, must be left out: DoRA loses the scales of 8-bit weights; it works with bits: 4"
        mistakes.append(("lora.use_dora", text))

    for index, stage in enumerate(config.stages):
        if getattr(getattr(stage.source, "generation", None), "engine", None) == "vllm":
            text = "was 'vllm', must be transformers (or a url) with quantization: vLLM would sample from another base"
            mistakes.append((f"stages.{index}.source.generation.engine", text))

    trainers = {"trainer": config.trainer} | {f"stages.{n}.trainer": s.trainer for n, s in enumerate(config.stages)}
    for where, settings in trainers.items():
        for name in _SHARDING:
            if settings.get(name):
                text = (
                    f"was {show(settings[name])}, must be left out with quantization: quantised weights are not "
                    "sharded; several processes train with a whole base on each (DDP)"
                )
                mistakes.append((f"{where}.{name}", text))
    return mistakes

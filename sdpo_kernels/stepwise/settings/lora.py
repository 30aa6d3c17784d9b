"""The section `lora:` of run.yaml: the driver's own names, and any other field of peft.LoraConfig.

lora: {r: 16, alpha: 32, target_modules: [q_proj, v_proj], use_rslora: true, rank_pattern: {q_proj: 32}}
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from pydantic import ConfigDict, field_validator, model_validator

from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, did_you_mean, show
from sdpo_kernels.stepwise.settings.trainer import convert
from sdpo_kernels.stepwise.settings.types import Count, Number, Positive, Section

_DRIVER = "the driver sets it"
_NOT_MERGED = "what it trains cannot be merged into the base weights, which every stage publishes"
_NEEDS_DATA = "its start is computed from data, in Python"

# fields of LoraConfig that cannot be set, and why
_REFUSED = {
    "task_type": _DRIVER,
    "peft_type": _DRIVER,
    "auto_mapping": _DRIVER,
    "peft_version": _DRIVER,
    "base_model_name_or_path": _DRIVER,
    "revision": _DRIVER,
    "inference_mode": _DRIVER,
    "runtime_config": _DRIVER,
    "megatron_config": "models of Megatron are not trained here",
    "megatron_core": "models of Megatron are not trained here",
    "lora_bias": _NOT_MERGED,
    "alora_invocation_tokens": _NOT_MERGED,
    "use_bdlora": _NOT_MERGED,
    "layer_replication": "it changes the base model, which would no longer be the reference",
    "loftq_config": "it quantises the base model",
    "use_qalora": "it is for models quantised by GPTQ",
    "qalora_group_size": "it is for models quantised by GPTQ",
    "eva_config": _NEEDS_DATA,
    "corda_config": _NEEDS_DATA,
    "lora_ga_config": _NEEDS_DATA,
    "arrow_config": "it mixes several adapters, and here there is one",
}
_STARTS = (True, "gaussian", "orthogonal")  # of init_lora_weights: the adapter changes nothing before its first step


class LoraSettings(Section):
    """Train a low-rank adapter (LoRA) instead of all weights.

    One adapter is trained through all stages. At the end of each stage it is saved, and merged into the base weights in
    float32 (see `publish`). Any other field of peft.LoraConfig may be set too.

    Args:
        r: Rank of the adapter.
        alpha: Scale of the adapter; its output is multiplied by alpha / r. PEFT's name lora_alpha works too.
        dropout: Must be 0. With dropout the first loss of a stage would not be ln 2, the check that it starts from its
            reference.
        target_modules: Which modules get an adapter: 'all-linear', a pattern (regular expression) or a list of names.
        publish: What a finished stage has: its 'adapter' alone, or 'merged' full weights too. 'auto' is merged, and
            with `quantization` the adapter alone.
    """

    model_config = ConfigDict(extra="allow")

    r: Count = 16
    alpha: Positive = 32.0
    dropout: Number = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    publish: Literal["auto", "merged", "adapter"] = "auto"

    @property
    def more(self) -> dict[str, Any]:
        """The further fields of LoraConfig."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        """`lora_alpha` and `lora_dropout`, as PEFT has them, under the driver's names."""
        if not isinstance(values, dict):
            return values
        for name in ("alpha", "dropout"):
            if {name, f"lora_{name}"} <= values.keys():
                raise SettingErrors([(f"lora_{name}", f"is the same as {name}, must be left out")])
        return {{"lora_alpha": "alpha", "lora_dropout": "dropout"}.get(key, key): v for key, v in values.items()}

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0:
            raise ValueError(
                f"was {show(dropout)}, must be 0: a stage starts from its reference, so its first loss must be ln 2, "
                "and dropout would break this check for a wrong reference"
            )
        return dropout

    @field_validator("target_modules", mode="before")
    @classmethod
    def _module_names(cls, value: Any) -> Any:
        names = value if isinstance(value, (list, tuple)) else [value]
        if not (names and all(isinstance(name, str) and name for name in names)):
            raise ValueError(f"was {show(value)}, must be all-linear, a pattern or a list of module names")
        return value

    @model_validator(mode="after")
    def _known_to_peft(self) -> LoraSettings:
        if not self.more:
            return self

        mistakes = []
        for name, value in self.more.items():
            try:
                self.__pydantic_extra__[name] = _checked(name, value)  # type: ignore[index]
            except ValueError as error:
                mistakes.append((name, str(error)))
        if mistakes:
            raise SettingErrors(mistakes)
        return self


def _checked(name: str, value: Any) -> Any:
    """The value of a field of peft.LoraConfig, converted to its type. Raises ValueError."""
    from peft import LoraConfig  # slow to import, so only when it is needed

    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    if name in _REFUSED:
        raise ValueError(f"cannot be set: {_REFUSED[name]}")
    if name not in fields:
        own = {*LoraSettings.model_fields, *fields} - _REFUSED.keys() - {"lora_alpha", "lora_dropout"}
        raise ValueError(f"unknown key; {did_you_mean(name, own)}")
    if name == "init_lora_weights" and value not in _STARTS:
        raise ValueError(
            f"was {show(value)}, must be true, gaussian or orthogonal: other adapters change the model, or its base, "
            "before their first step"
        )
    return convert(typing.get_type_hints(LoraConfig)[name], value)

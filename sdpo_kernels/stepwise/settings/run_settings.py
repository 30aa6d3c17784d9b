"""The schema of run.yaml: what a run and its stages may set, with defaults, and what contradicts what.

    config.stage_beta(config.stages[0]); config.stage_trainer(config.stages[0])

Strict: an unknown key, a value of the wrong type and settings that contradict each other are errors. `run_file.py`
reads the file and turns these errors into lines for the user.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from sdpo_kernels import losses
from sdpo_kernels.losses import LossSum
from sdpo_kernels.stepwise.settings.loss import Loss, loss_mistakes
from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.post import ExpoSettings, PostSettings, post_mistakes
from sdpo_kernels.stepwise.settings.reference import EmaSettings, MultiSettings, reference_mistakes
from sdpo_kernels.stepwise.settings.source import Source
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER, check_trainer
from sdpo_kernels.stepwise.settings.types import Integer, Number, Section, Sources, Text

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _empty_as_dict(value: Any) -> Any:
    """`trainer:` with nothing below it is what is left when its lines are commented out."""
    return {} if value is None else value


Options = Annotated[dict[str, Any], BeforeValidator(_empty_as_dict)]


class LoraSettings(Section):
    """Train a low-rank adapter; at a stage's end it is merged and full weights are saved."""

    r: Annotated[Integer, Field(ge=1)] = 16
    alpha: Annotated[Number, Field(gt=0)] = 32.0
    dropout: Number = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0:
            raise ValueError(
                f"was {show(dropout)}, must be 0: a stage starts from its reference, and with dropout its first loss "
                "would not be ln 2, the check that catches a wrong reference"
            )
        return dropout

    @field_validator("target_modules", mode="before")
    @classmethod
    def _module_names(cls, value: Any) -> Any:
        names = value if isinstance(value, (list, tuple)) else [value]
        if not (names and all(isinstance(name, str) and name for name in names)):
            raise ValueError(f"was {show(value)}, must be all-linear, a pattern or a list of module names")
        return value


class StageConfig(Section):
    """One stage: its data, or prompts and how pairs are made of them, and what it sets otherwise than the run."""

    name: str
    data: Sources | None = None
    prompts: Sources | None = None
    source: Source | None = None
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    beta: Annotated[Number, Field(gt=0)] | None = None
    trainer: Options = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        if not _FOLDER_NAME.fullmatch(name):
            raise ValueError(f"was {show(name)}, must be letters, digits, '.', '_' or '-': it names a folder")
        if name == "eval_data":
            raise ValueError("was 'eval_data', must be another name: messages mean the evaluation data by it")
        return name

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return check_trainer(settings)

    @model_validator(mode="after")
    def _has_pairs(self) -> StageConfig:
        if self.source is None:
            if self.data is None:
                raise SettingErrors([("data", "is required (or prompts and source, for pairs that are made)")])
            if self.prompts is not None:
                raise SettingErrors([("source", "is required with prompts: how pairs are made of them")])
        elif self.prompts is None or self.data is not None:
            text = "is required with source" if self.prompts is None else "was set with data, must be without"
            raise SettingErrors([("prompts", text)])
        return self


class RunConfig(Section):
    """All settings of a run. `trainer` holds DEFAULT_TRAINER with the run's own values over it."""

    model: Text
    dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: Text
    order: Literal["given", "reward_accuracy", "margin", "random"] = "given"
    order_score: Literal["sum", "mean"] = "sum"
    tiers: Annotated[Integer, Field(ge=2)] | None = None
    score_column: Text | None = None
    reference: Literal["previous", "initial", "ema", "multi", "none"] = "previous"
    multi: MultiSettings | None = None
    ema: EmaSettings | None = None
    policy: Literal["previous", "initial"] = "previous"
    loss: Loss = "sigmoid"
    loss_options: Options = Field(default_factory=dict)
    beta: Annotated[Number, Field(gt=0)] = 0.1
    max_length: Annotated[Integer, Field(ge=2)] = 1024
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    on_bad_row: Literal["error", "skip"] = "error"
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    eval_data: Sources | None = None
    batching: Literal["packed", "padded"] = "packed"
    trust_remote_code: bool = False
    trainer: Options = Field(default_factory=dict, validate_default=True)
    lora: LoraSettings | None = None
    post: PostSettings | None = None

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return check_trainer(DEFAULT_TRAINER | settings)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        mistakes = [*_order_mistakes(self), *_stage_mistakes(self), *_source_mistakes(self), *post_mistakes(self)]
        mistakes += [*reference_mistakes(self.reference, self.multi, self.ema), *loss_mistakes(self)]
        if self.dtype == "bfloat16" and self.lora is None:
            mistakes.append(
                (
                    "dtype",
                    "was 'bfloat16' without lora, must be float32: lr 5e-7 vanishes in bf16 weights "
                    "(for bf16 compute set trainer.bf16: true)",
                )
            )
        if mistakes:
            raise SettingErrors(mistakes)
        if self.loss_sum.reference_free:  # nothing is scored then; the run's config and manifest say so
            object.__setattr__(self, "reference", "none")
        return self

    @property
    def loss_sum(self) -> LossSum:
        """The loss with its options, one or a weighted sum."""
        return losses.loss_sum(self.loss, self.loss_options)

    @property
    def expo(self) -> ExpoSettings | None:
        """ExPO's settings, if the run asks for it after its last stage."""
        return None if self.post is None else self.post.expo

    def stage_beta(self, stage: StageConfig) -> float:
        """β of a stage."""
        return self.beta if stage.beta is None else stage.beta

    def stage_trainer(self, stage: StageConfig) -> dict[str, Any]:
        """Fields for TrainingArguments of a stage, without those the driver owns.

        bf16 compute on a machine without an accelerator needs `use_cpu`, which transformers leaves to the caller. It is
        set here and not in the config, so that a run can be read on another machine without a difference.
        """
        settings = self.trainer | stage.trainer
        if settings.get("bf16") and "use_cpu" not in settings:
            import torch

            if not torch.accelerator.is_available():
                settings["use_cpu"] = True
        return settings


def _order_mistakes(config: RunConfig) -> list[tuple[str, str]]:
    mistakes = []
    if config.order == "margin":
        if config.tiers is None:
            mistakes.append(("tiers", "is required with order: margin (how many stages its pairs are cut into)"))
        if len(config.stages) != 1:
            count = len(config.stages)
            mistakes.append(
                ("stages", f"were {count}, must be exactly one with order: margin, which cuts it into tiers")
            )
    elif config.tiers is not None:
        mistakes.append(("tiers", f"was {config.tiers}, but only order: margin uses it (order is {config.order})"))
    if config.score_column is not None and config.order != "reward_accuracy":
        text = f"was {show(config.score_column)}, but only order: reward_accuracy uses it (order is {config.order})"
        mistakes.append(("score_column", text))
    ranks_by_logps = config.order == "margin" or (config.order == "reward_accuracy" and not config.score_column)
    if config.order_score != "sum" and not ranks_by_logps:
        text = f"was {config.order_score!r}, but nothing is ranked by log-probs with these order and score_column"
        mistakes.append(("order_score", text))
    return mistakes


def _stage_mistakes(config: RunConfig) -> list[tuple[str, str]]:
    mistakes = []
    first: dict[str, int] = {}
    for index, stage in enumerate(config.stages):
        if stage.name in first:
            text = f"was {show(stage.name)}, which stages.{first[stage.name]} has too; names must differ"
            mistakes.append((f"stages.{index}.name", text))
        first.setdefault(stage.name, index)
        settings = config.trainer | stage.trainer
        strategy = settings.get("eval_strategy", "no")
        if strategy != "no" and config.eval_data is None:
            mistakes.append(("eval_data", f"is required with eval_strategy: {strategy} (stage {stage.name})"))
        try:
            check_trainer(settings)
        except SettingErrors as error:
            mistakes += [(f"stages.{index}.trainer.{key}", text) for key, text in error.mistakes]
    return mistakes


def _source_mistakes(config: RunConfig) -> list[tuple[str, str]]:
    mistakes = []
    made = [stage for stage in config.stages if stage.source is not None]
    if made and config.order != "given":
        mistakes.append(
            ("order", f"was {config.order!r}, must be given: stage {made[0].name!r} makes its pairs itself")
        )
    for index, stage in enumerate(config.stages):
        if stage.source is not None and stage.source.kind == "active" and config.policy != "initial":
            text = f"was 'active' with policy: {config.policy}; each of its rounds starts anew: set policy: initial"
            mistakes.append((f"stages.{index}.source.kind", text))
        if stage.source is not None and stage.source.kind == "active" and config.reference in ("previous", "none"):
            text = f"was {config.reference!r}, must be initial (or ema, multi): active starts anew from the reference"
            mistakes.append(("reference", text))
    return mistakes

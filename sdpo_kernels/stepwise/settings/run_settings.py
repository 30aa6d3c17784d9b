"""The schema of run.yaml: settings of a run and its stages, their defaults, and which of them contradict each other.

    config.stage_beta(config.stages[0]); config.stage_trainer(config.stages[0])

The schema is strict: unknown keys, values of the wrong type and contradicting settings are errors. `run_file.py` reads
the file and turns these errors into lines for the user.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sdpo_kernels import losses
from sdpo_kernels.losses import LossSum
from sdpo_kernels.stepwise.settings.columns import ColumnSettings, DataSources, PromptMode
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.loss import Loss, loss_mistakes
from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.parallel import parallel_mistakes
from sdpo_kernels.stepwise.settings.post import ExpoSettings, PostSettings, post_mistakes
from sdpo_kernels.stepwise.settings.quantization import QuantizationSettings, quantization_mistakes
from sdpo_kernels.stepwise.settings.reference import EmaSettings, MultiSettings, reference_mistakes
from sdpo_kernels.stepwise.settings.source import Source
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER, check_trainer
from sdpo_kernels.stepwise.settings.types import Integer, Number, Positive, Section, Sources, Text, Time

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _empty_as_dict(value: Any) -> Any:
    """Treats `trainer:` with all lines below it commented out, which YAML reads as null, like an empty mapping."""
    return {} if value is None else value


Options = Annotated[dict[str, Any], BeforeValidator(_empty_as_dict)]


class StageConfig(Section):
    """Settings of one stage: its pairs, and the settings of the run that it overrides.

    Either `data` is required, or both `prompts` and `source`.

    Args:
        name: Name of the stage's folder. Must be unique in a run.
        data: Preference pairs: a data file or Hub dataset, or a list of them. An entry may be a mapping with `path` and
            its own `columns` or `prompt`.
        prompts: Prompts to generate pairs from: a data file or Hub dataset, or a list of them.
        source: How pairs are generated from `prompts`.
        columns: The file's names for the parts of a pair, instead of the run's `columns`.
        prompt: Where prompts come from, instead of the run's `prompt`.
        epochs: Passes over the stage's pairs; may be a fraction.
        beta: β of this stage, instead of the run's.
        trainer: Fields of TrainingArguments for this stage; they take precedence over the run's.
    """

    name: str
    data: DataSources | None = None
    prompts: Sources | None = None
    source: Source | None = None
    columns: ColumnSettings | None = None
    prompt: PromptMode | None = None
    epochs: Positive = 1.0
    beta: Positive | None = None
    trainer: Options = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        if not _FOLDER_NAME.fullmatch(name):
            raise ValueError(
                f"was {show(name)}, must be at most 64 letters, digits, '.', '_' or '-', the first a letter or digit: "
                "it names a folder"
            )
        if name == "eval_data":
            raise ValueError("was 'eval_data', must be another name: in messages it means the evaluation data")
        return name

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return check_trainer(settings)

    @model_validator(mode="after")
    def _has_pairs(self) -> StageConfig:
        if self.source is None:
            if self.data is None:
                raise SettingErrors([("data", "is required (or prompts and source, for generated pairs)")])
            if self.prompts is not None:
                raise SettingErrors([("source", "is required with prompts: it says how to generate pairs")])
        elif self.prompts is None or self.data is not None:
            text = (
                "is required with source" if self.prompts is None else "was set together with data, must be set alone"
            )
            raise SettingErrors([("prompts", text)])
        return self


def _by_its_own_name(value: Any) -> Any:
    """The paper says reward accuracy for what is pair accuracy here, and so did earlier versions of this setting."""
    return "pair_accuracy" if value == "reward_accuracy" else value


Order = Annotated[Literal["given", "pair_accuracy", "margin", "random"], BeforeValidator(_by_its_own_name)]


class RunConfig(Section):
    """All settings of a run: the top level of run.yaml.

    Args:
        model: Folder or Hub name of the initial model M₀: safetensors weights and a tokenizer.
        dtype: Data type of the trained weights. 'bfloat16' is for a frozen base with `lora` only. For bfloat16 compute
            set `trainer.bf16: true` instead.
        output_dir: Folder of the run. Running the same command again resumes the run in it.
        order: Order of the stages. 'given' keeps the order of the file. 'pair_accuracy' puts the stages first whose
            pairs the initial model ranks right most often, as in the paper (which calls this reward accuracy:
            'reward_accuracy' is read as 'pair_accuracy'). 'margin' splits a single stage into `tiers`, easiest first.
            'random' deals all pairs out to the stages at random.
        order_score: What ranks a pair: the 'sum' or the 'mean' of its log-probs.
        tiers: Number of stages that `order: margin` splits the pairs into.
        score_column: Rank by an external score with `order: pair_accuracy`: the name of the column that contains
            chosen minus rejected, or of two columns without their endings '_chosen' and '_rejected'.
        reference: The reference model of a stage: 'previous' (the previous stage's model, sDPO), 'initial' (M₀),
            'multi' (several models mixed, MRPO), 'ema' (follows the policy while a stage trains, SAPO), 'guiding'
            (another model, trained before, Pre-DPO) or 'none' (reference log-probs of 0).
        multi: Settings of `reference: multi`.
        ema: Settings of `reference: ema`.
        guiding: Folder or Hub name of the model that is the reference of every stage with `reference: guiding`.
        reference_cache: Folder in which log-probs of references outlive the run, for other runs on the same model and
            pairs. By default they are in the run's own folder only.
        policy: Where a stage's weights start: 'previous' (the previous stage's model) or 'initial' (M₀).
        loss: Name of a loss, or a weighted list of {name, weight, options}.
        loss_options: Options of a loss given by name, e.g. {label_smoothing: 0.1}.
        beta: β of the loss.
        max_length: Most tokens of a prompt and its completion together.
        truncation: Which end of a longer sequence is kept: 'keep_start' or 'keep_end'.
        columns: The file's names for the parts of a pair, such as {prompt: question, system: system}. A prompt of
            several columns, {prompt: [instruction, input]}, is joined by line breaks.
        prompt: 'column' requires a prompt column for pairs of plain strings. 'implicit' takes the text that both
            answers start with. Conversations may always leave it out: their common messages are the prompt.
        on_bad_row: 'error' stops at bad rows in a data file before any training; 'skip' leaves them out and lists them.
        stages: The stages, at least one.
        eval_data: Pairs on which M₀ and every stage's model are scored.
        samples: How many evaluation prompts M₀ and every stage's model answer, for the report. An answer is greedy and
            has at most 64 tokens.
        template_time: The time that chat templates read as now (`strftime_now`): a date, or a date and time. By default
            that of the run's first start.
        batching: 'packed' concatenates sequences without padding; 'padded' is for models that cannot keep packed
            sequences apart.
        prefix_sharing: 'auto' lets the tokens that both answers of a pair begin with, such as the prompt, go through
            the model once, if its attention allows; 'off' never does. Needs packed batches.
        grad_tol: How much of the head's backward may be skipped: for each token whole blocks of 64 vocabulary entries,
            the least probable first, while their probabilities add up to at most this; 0 skips nothing. With 0.0039
            (2**-8) most of a real model's head backward on the CPU is skipped, and its gradients as a whole change by
            a few thousandths, those of single tokens by more. It must be 0 with `tp_size` and `trainer.fsdp`, which
            divide the head.
        grad_tol_relative: Whether the bound shrinks with 1 − p, p the probability of the token itself, so that
            tokens the model is sure of keep accurate gradients, too. The same `grad_tol` then skips less: 0.0156
            (2**-6) about as much as 0.0039 without. It needs a `grad_tol`.
        attn_implementation: The attention that transformers uses, such as 'flash_attention_2' or 'sdpa'. By default
            the fastest one that keeps packed sequences apart; one that does not gets padded batches.
        trust_remote_code: Whether code that comes with the model may run.
        tp_size: How many processes hold one model together, each a part of every layer (tensor parallelism, by the
            plan that transformers has for the model). Must be 1 or the number of processes.
        trainer: Any field of transformers.TrainingArguments that the driver does not set itself. DEFAULT_TRAINER fills
            in what is missing.
        lora: Train a low-rank adapter instead of all weights.
        quantization: Load the frozen base of `lora` in 4 or 8 bits (QLoRA).
        post: What is done after the last stage.
    """

    model: Text
    dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: Text
    order: Order = "given"
    order_score: Literal["sum", "mean"] = "sum"
    tiers: Annotated[Integer, Field(ge=2)] | None = None
    score_column: Text | None = None
    reference: Literal["previous", "initial", "ema", "multi", "guiding", "none"] = "previous"
    multi: MultiSettings | None = None
    ema: EmaSettings | None = None
    guiding: Text | None = None
    reference_cache: Text | None = None
    policy: Literal["previous", "initial"] = "previous"
    loss: Loss = "sigmoid"
    loss_options: Options = Field(default_factory=dict)
    beta: Positive = 0.1
    max_length: Annotated[Integer, Field(ge=2)] = 1024
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    columns: ColumnSettings | None = None
    prompt: PromptMode = "column"
    on_bad_row: Literal["error", "skip"] = "error"
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    eval_data: DataSources | None = None
    samples: Annotated[Integer, Field(ge=0, le=20)] = 0
    template_time: Time | None = None
    batching: Literal["packed", "padded"] = "packed"
    prefix_sharing: Literal["auto", "off"] = "auto"
    grad_tol: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    grad_tol_relative: bool = False
    attn_implementation: Text | None = None
    trust_remote_code: bool = False
    tp_size: Annotated[Integer, Field(ge=1)] = 1
    trainer: Options = Field(default_factory=dict, validate_default=True)
    lora: LoraSettings | None = None
    quantization: QuantizationSettings | None = None
    post: PostSettings | None = None

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return check_trainer(DEFAULT_TRAINER | settings)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        mistakes = [*_order_mistakes(self), *_stage_mistakes(self), *_source_mistakes(self), *post_mistakes(self)]
        mistakes += reference_mistakes(self.reference, self.multi, self.ema, self.guiding)
        mistakes += loss_mistakes(self)
        mistakes += quantization_mistakes(self)

        if self.samples and self.eval_data is None:
            mistakes.append(
                ("eval_data", f"is required with samples: {self.samples}, which are answers to its prompts")
            )
        if self.grad_tol_relative and "grad_tol" not in self.model_fields_set:  # a 0 that is written down is meant
            text = "was true, needs a grad_tol: for example 0.0156, or 0 for exact gradients"
            mistakes.append(("grad_tol_relative", text))
        if self.dtype == "bfloat16" and self.lora is None:
            text = (
                "was 'bfloat16' without lora, must be float32: updates at lr 5e-7 vanish in bf16 weights "
                "(for bf16 compute set trainer.bf16: true)"
            )
            mistakes.append(("dtype", text))

        mistakes += parallel_mistakes(self)
        if mistakes:
            raise SettingErrors(mistakes)

        # no reference is scored then, and the run's config and manifest should show that
        if self.loss_sum.reference_free:
            object.__setattr__(self, "reference", "none")
        return self

    @property
    def loss_sum(self) -> LossSum:
        """The loss with its options: a single loss, or a weighted sum."""
        return losses.loss_sum(self.loss, self.loss_options)

    @property
    def other_references(self) -> dict[str, str]:
        """Reference models besides the run's own, by the setting that names them."""
        if self.guiding is not None:
            return {"guiding": self.guiding}
        models = () if self.multi is None else self.multi.models
        return {f"multi.models.{index}": model for index, model in enumerate(models)}

    @property
    def expo(self) -> ExpoSettings | None:
        """ExPO's settings, or None if the run does not use it."""
        return None if self.post is None else self.post.expo

    @property
    def publishes_merged(self) -> bool:
        """Whether a finished stage has full weights: its own, or the base with the adapter merged into it."""
        if self.lora is None or self.lora.publish != "auto":
            return self.lora is None or self.lora.publish == "merged"
        return self.quantization is None

    @property
    def is_low_precision(self) -> bool:
        """Whether the weights, or the products with them, have fewer bits than float32; autocast aside."""
        return self.dtype != "float32" or (self.quantization is not None and self.quantization.is_low_precision)

    @property
    def of_full_weights(self) -> RunConfig:
        """The same settings for a folder's full weights: without an adapter, and not quantised."""
        return self.model_copy(update={"lora": None, "quantization": None})

    def stage_beta(self, stage: StageConfig) -> float:
        """β of a stage: its own, else the run's."""
        return self.beta if stage.beta is None else stage.beta

    def stage_trainer(self, stage: StageConfig) -> dict[str, Any]:
        """Fields for the TrainingArguments of a stage, without those that the driver sets itself.

        For bf16 compute without an accelerator transformers requires the caller to set `use_cpu`. That is done here
        rather than in the config, so that the config of a run is the same on every machine.
        """
        settings = self.trainer | stage.trainer
        if settings.get("bf16") and "use_cpu" not in settings:
            import torch

            if not torch.accelerator.is_available():
                settings["use_cpu"] = True
        return settings


def _order_mistakes(config: RunConfig) -> list[tuple[str, str]]:
    """Settings that `order` needs and the file lacks, and settings that it does not use."""
    mistakes = []

    # margin splits one stage into tiers; no other order knows tiers
    if config.order == "margin":
        if config.tiers is None:
            mistakes.append(("tiers", "is required with order: margin (the number of stages the pairs are split into)"))
        if len(config.stages) != 1:
            text = f"were {len(config.stages)}, must be exactly one with order: margin, which splits it into tiers"
            mistakes.append(("stages", text))
    elif config.tiers is not None:
        mistakes.append(("tiers", f"was {config.tiers}, but only order: margin uses it (order is {config.order})"))

    if config.score_column is not None and config.order != "pair_accuracy":
        text = f"was {show(config.score_column)}, but only order: pair_accuracy uses it (order is {config.order})"
        mistakes.append(("score_column", text))

    # with an external score no log-probs are ranked, so order_score would be silently ignored
    ranks_by_logps = config.order == "margin" or (config.order == "pair_accuracy" and not config.score_column)
    if config.order_score != "sum" and not ranks_by_logps:
        text = f"was {config.order_score!r}, but nothing is ranked by log-probs with this order and score_column"
        mistakes.append(("order_score", text))
    return mistakes


def _stage_mistakes(config: RunConfig) -> list[tuple[str, str]]:
    """Names that occur twice, evaluation without data, and trainer fields that contradict the run's."""
    mistakes = []
    first: dict[str, int] = {}

    for index, stage in enumerate(config.stages):
        if stage.name in first:
            text = f"was {show(stage.name)}, must be unique: stages.{first[stage.name]} has the same name"
            mistakes.append((f"stages.{index}.name", text))
        first.setdefault(stage.name, index)

        # each section was checked alone; only together can they contradict each other
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
    """Settings of the run that do not fit stages with generated pairs."""
    mistakes = []

    # pairs that do not exist yet cannot be ranked
    generated = [stage for stage in config.stages if stage.source is not None]
    if generated and config.order != "given":
        text = f"was {config.order!r}, must be given: stage {generated[0].name!r} generates its pairs"
        mistakes.append(("order", text))

    # the average is not a model in a folder of its own, which vLLM would need
    for index, stage in enumerate(config.stages):
        rewrites = stage.source is not None and stage.source.kind == "self_augmented"
        if rewrites and config.reference == "ema" and stage.source.generation.engine == "vllm":  # type: ignore[union-attr]
            text = "was 'vllm', must be transformers with reference: ema, whose average rewrites the segments"
            mistakes.append((f"stages.{index}.source.generation.engine", text))

    # active learning trains on all labels so far, so every round must restart from the same model
    for index, stage in enumerate(config.stages):
        if stage.source is None or stage.source.kind != "active":
            continue
        if config.policy != "initial":
            text = (
                f"was 'active' with policy: {config.policy}, must be with policy: initial: each round restarts from M₀"
            )
            mistakes.append((f"stages.{index}.source.kind", text))
        if config.reference in ("previous", "none"):
            text = f"was {config.reference!r}, must be initial (or ema, multi): active restarts from its reference"
            mistakes.append(("reference", text))
    return mistakes

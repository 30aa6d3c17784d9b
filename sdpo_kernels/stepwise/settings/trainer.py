"""The section `trainer:` of run.yaml: any field of transformers.TrainingArguments, checked by name and type.

`check_trainer` runs when the config is read, long before TrainingArguments is built. A field that the driver sets
itself, one that transformers 5 removed, an unknown name and a value of the wrong type are each reported as one line.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdpo_kernels.stepwise.settings.fsdp import FSDP_KEYS, check_fsdp_config
from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, did_you_mean, must_be, show

DEFAULT_TRAINER: dict[str, Any] = {
    "learning_rate": 5e-7,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "logging_steps": 10,
    "save_steps": 0.2,  # below 1: a fraction of the stage's steps, so a kill costs at most a fifth of a stage
    "report_to": "none",
    "seed": 42,
}

# Fields the driver sets itself, and what to use instead.
_OWN_METRICS = "the driver computes its own metrics"
_NO_BEST = "a stage's result is its last model; compare stages on eval_data"
_NO_HUB = "push a finished stage folder with `hf upload` instead"
OWNED: dict[str, str] = {
    "output_dir": "use the key output_dir at the top",
    "num_train_epochs": "use epochs of a stage",
    "remove_unused_columns": "the driver's batches need their own columns, so it is always false",
    "label_names": "the driver's batches have no labels for Trainer to find",
    "label_smoothing_factor": "use loss_options: {label_smoothing: …}",
    "load_best_model_at_end": _NO_BEST,
    "metric_for_best_model": _NO_BEST,
    "greater_is_better": _NO_BEST,
    "push_to_hub": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_revision": _NO_HUB,
    "resume_from_checkpoint": "run the same command again to resume",
    "restore_callback_states_from_checkpoint": "the driver restores what it needs",
    "ignore_data_skip": "a resumed run must see the same batches, so it is always false",
    "save_only_model": "a checkpoint without optimizer state would resume incorrectly without an error",
    "save_total_limit": "the driver keeps the last complete checkpoint of the stage in progress",
    "disable_tqdm": "the driver draws its own progress; use `--quiet`",
    "logging_first_step": "the first step is always logged: its loss shows whether the stage starts from its reference",
    "logging_nan_inf_filter": "it would log a NaN loss as 0; the driver stops at a NaN loss instead",
    "prediction_loss_only": _OWN_METRICS,
    "include_for_metrics": _OWN_METRICS,
    "batch_eval_metrics": _OWN_METRICS,
    "eval_do_concat_batches": _OWN_METRICS,
    "use_liger_kernel": "the driver has its own fused head",
    "liger_kernel_config": "the driver has its own fused head",
    "use_cache": "a key/value cache would leak between packed sequences, so it is always false",
    "neftune_noise_alpha": "noise breaks the check that a stage starts from its reference",
    "auto_find_batch_size": "a run must be reproducible; set per_device_train_batch_size",
    "bf16_full_eval": "scores are computed in the precision of training; use bf16",
    "fp16_full_eval": "scores are computed in the precision of training; use fp16",
    "length_column_name": "use train_sampling_strategy: random or sequential",
    "do_train": "use the command `sdpo train`",
    "do_eval": "use eval_strategy",
    "do_predict": "use the command `sdpo score`",
    "local_rank": "torchrun sets it",
    "parallelism_config": "use tp_size at the top level for tensor parallelism",
}

# Fields that transformers 5 removed, and what replaced them.
REMOVED: dict[str, str] = {
    "warmup_ratio": "use warmup_steps: a value below 1 is a ratio",
    "evaluation_strategy": "use eval_strategy",
    "no_cuda": "use use_cpu",
    "use_mps_device": "it is detected automatically",
    "overwrite_output_dir": "delete the run's folder or choose another output_dir",
    "group_by_length": "packed batches have no padding to save; remove it",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "weights are always safetensors",
    "tokenizer": "it is loaded from model",
    "half_precision_backend": "use bf16 or fp16",
    "fp16_backend": "use bf16 or fp16",
    "fp16_opt_level": "use bf16 or fp16",
    "adafactor": "use optim: adafactor",
    "torchdynamo": "use torch_compile_backend",
    "fsdp_min_num_params": "use fsdp_config: {min_num_params: …}",
    "fsdp_transformer_layer_cls_to_wrap": "use fsdp_config: {transformer_layer_cls_to_wrap: …}",
    "include_tokens_per_second": "use include_num_input_tokens_seen",
}

_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
LARGEST = 2**31 - 1  # of sizes and counts of steps; beyond it some library overflows, and no run would end

# Limits that TrainingArguments does not check, so that training would fail late: (field, is valid, must be).
_LIMITS: list[tuple[str, typing.Callable[[Any], bool], str]] = [
    ("learning_rate", lambda v: v > 0, "above 0"),
    *((name, lambda v: 1 <= v <= LARGEST, f"at least 1 and at most {LARGEST}") for name in _SIZES),
    ("seed", lambda v: 0 <= v < 2**32, f"at least 0 and at most {2**32 - 1}"),
    ("data_seed", lambda v: v is None or 0 <= v < 2**32, f"at least 0 and at most {2**32 - 1}"),
    ("logging_steps", lambda v: v > 0, "above 0"),
    ("save_steps", lambda v: v > 0, "above 0"),
    ("warmup_steps", lambda v: v >= 0, "at least 0"),
    ("weight_decay", lambda v: v >= 0, "at least 0"),
    ("max_grad_norm", lambda v: v >= 0, "at least 0"),
    ("max_steps", lambda v: v == -1 or 1 <= v <= LARGEST, f"at least 1 and at most {LARGEST}, or -1 for all epochs"),
    ("save_strategy", lambda v: v != "best", "steps, epoch or no (a stage's result is its last model)"),
    (
        "train_sampling_strategy",
        lambda v: v in ("random", "sequential"),
        "random or sequential (packed batches have no padding that sorting by length would save)",
    ),
]


def check_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """Check `settings` field by field and convert numbers given as strings. Raises SettingErrors with all mistakes."""
    mistakes: list[tuple[str, str]] = []
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        try:
            checked[name] = _check_field(name, value)
        except ValueError as error:
            mistakes.append((str(name), str(error)))

    if checked.get("bf16") and checked.get("fp16"):
        mistakes.append(("fp16", "was true together with bf16: true; only one of the two can be true"))
    if mistakes:
        raise SettingErrors(mistakes)
    return checked


def trainer_fields() -> set[str]:
    """The fields that may be set under `trainer`."""
    return set(training_fields()) - set(OWNED)


@functools.cache
def training_fields() -> dict[str, dataclasses.Field]:
    """The fields of transformers.TrainingArguments, by name."""
    from transformers import TrainingArguments  # slow to import, so only when settings are read

    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


@functools.cache
def _field_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    # transformers documents `fsdp: true`, though the annotation is `str | None`
    return typing.get_type_hints(TrainingArguments) | {"fsdp": bool | str | None}


def _check_field(name: str, value: Any) -> Any:
    """The checked and converted value of one field.

    1. Refuse fields that the driver sets, that transformers removed, or that do not exist.
    2. Convert the value to the field's type.
    3. Check it against the field's choices and limits.
    """
    fields = training_fields()
    if name in OWNED and name in fields:
        raise ValueError(f"is set by the driver: {OWNED[name]}")
    if name in REMOVED and name not in fields:
        raise ValueError(f"was removed in transformers 5: {REMOVED[name]}")
    if name not in fields:
        if name.removeprefix("fsdp_") in FSDP_KEYS:
            raise ValueError(f"unknown key; it belongs to trainer.fsdp_config: {{{name}: …}}")
        raise ValueError(f"unknown key; {did_you_mean(name, trainer_fields())}")

    value = convert(_field_types()[name], value)
    if name == "fsdp_config" and isinstance(value, dict):
        check_fsdp_config(value)

    # some fields list their choices in the metadata, as plain strings
    choices = list(fields[name].metadata.get("choices") or ())
    if choices and value is not None and value not in choices:
        raise ValueError(f"was {show(value)}, must be one of {', '.join(map(str, choices))}")
    for limited, is_valid, must in _LIMITS:
        if limited == name and not is_valid(value):
            raise ValueError(f"was {show(value)}, must be {must}")
    return value


def convert(hint: Any, value: Any) -> Any:
    """Convert `value` to the type `hint`: "5e-7" becomes 5e-7; an unknown name of an enum is an error."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if is_union else (hint,)

    # pydantic would read true as 1
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError(f"was {show(value)}, must be a number")
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
            return _enum_value(kind, value)

    limits = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        converted = TypeAdapter(hint, config=limits).validate_python(value)
    except ValidationError as error:
        choices = sorted({must_be(problem).removeprefix("must be ") for problem in error.errors()})
        raise ValueError(f"was {show(value)}, must be {' or '.join(choices)}") from None

    # the config stays plain YAML, as the user wrote it: 10 stays 10, not 10.0, and no enum members
    if isinstance(value, int) and isinstance(converted, float):
        return value
    return converted if isinstance(converted, (bool, int, float)) else value


def _enum_value(kind: type[enum.Enum], value: str) -> str:
    values = [str(member.value) for member in kind]
    if value not in values:
        raise ValueError(f"was {show(value)}; {did_you_mean(value, values)}")
    return value

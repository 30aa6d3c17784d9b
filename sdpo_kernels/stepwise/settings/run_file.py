"""Read and check run.yaml, make its paths absolute, write settings back, compare them with earlier ones.

    config = load_config("run.yaml", ["beta=0.05", "stages.0.epochs=2"])
    config_diff(manifest["config"], config.model_dump(mode="json"))

All mistakes are raised as one UserError with a line for each: the file, the key, what it was and what it must be.
Relative paths (output_dir, data files, and model if it is a folder) are relative to the current working directory, not
to the YAML's folder, as in shells and in TRL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.columns import ColumnSettings, DataEntry
from sdpo_kernels.stepwise.settings.generation import GenerationSettings
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.mistakes import error_lines
from sdpo_kernels.stepwise.settings.post import ExpoSettings, PostSettings
from sdpo_kernels.stepwise.settings.quantization import QuantizationSettings
from sdpo_kernels.stepwise.settings.reference import EmaSettings, MultiSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.source import SOURCES, RankedSource
from sdpo_kernels.stepwise.settings.trainer import trainer_fields
from sdpo_kernels.stepwise.settings.types import is_file_source
from sdpo_kernels.stepwise.settings.yaml_file import apply_override, read_settings, write_settings

SECTIONS: dict[str, type[BaseModel]] = {
    "": RunConfig,
    "stages": StageConfig,
    "lora": LoraSettings,
    "quantization": QuantizationSettings,
    "multi": MultiSettings,
    "ema": EmaSettings,
    "columns": ColumnSettings,
    "<entry>": DataEntry,
    "post": PostSettings,
    "post.expo": ExpoSettings,
    "generation": GenerationSettings,
    **{f"source.{kind}": section for kind, section in SOURCES.items()},
}
CONFIG = "config.yaml"  # in a run's folder
_ABSENT = object()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked settings of a run.

    1. Read the YAML file.
    2. Apply `overrides` in order: 'key=value', where dots in the key lead into sections and the value is YAML.
    3. Check everything against the schema.
    4. Make paths absolute. The config.yaml that a run has written into its folder is about the run in that folder,
       even if the folder was moved or copied, unless an override names another output_dir.

    Raises UserError with one line per mistake.
    """
    settings = read_settings(path)
    for override in overrides:
        apply_override(settings, override)

    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(error_lines(error, str(path), overrides, SECTIONS, trainer_fields()))) from None

    own = None if any(override.startswith("output_dir=") for override in overrides) else _folder_of_run(Path(path))
    return _resolve_paths(config, str(path), own)


def dump_config(config: RunConfig) -> str:
    """The config as YAML, with all defaults filled in; `load_config` reads back an equal config."""
    return write_settings(config.model_dump())


def with_new_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """The stored config of a run, with defaults for the settings that an earlier version did not have.

    A config that this version refuses is returned as it is: its differences are then shown like any others.
    """
    try:
        return RunConfig.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def config_diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per setting that differs: 'stages.0.beta: 0.1 -> 0.05'. A key missing on one side is 'absent' there."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key}: {_plain(before.get(key, _ABSENT))} -> {_plain(after.get(key, _ABSENT))}"
        for key in before | after
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def _plain(value: Any) -> str:
    return "absent" if value is _ABSENT else value if isinstance(value, str) else json.dumps(value)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as dotted keys with plain values. An empty list or dict counts as a value, a tuple as a list."""
    if not isinstance(value, (dict, list, tuple)):
        return {prefix: value}
    if not value and prefix:
        return {prefix: {} if isinstance(value, dict) else []}

    flat: dict[str, Any] = {}
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= _flatten(below, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _folder_of_run(path: Path) -> str | None:
    """The folder of `path` if it is the config.yaml that a run has written there: the run may have been moved."""
    is_runs = path.name == CONFIG and (path.parent / "manifest.json").exists()
    return _absolute(str(path.parent)) if is_runs else None


def _resolve_paths(config: RunConfig, file: str, own_folder: str | None) -> RunConfig:
    """The config with absolute paths, so that it means the same from any working directory.

    `own_folder` takes the place of output_dir.
    """
    output = _absolute(config.output_dir)
    if own_folder is not None:
        output = own_folder
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"{file}: output_dir: was {config.output_dir!r}, which is a file, must be a folder")

    stages = tuple(_absolute_stage(stage) for stage in config.stages)
    return config.model_copy(
        update={
            "model": absolute_model(config.model, f"{file}: model"),
            "multi": _absolute_models(config.multi, file),
            "guiding": config.guiding and absolute_model(config.guiding, f"{file}: guiding"),
            "output_dir": output,
            "reference_cache": config.reference_cache and _absolute(config.reference_cache),
            "stages": stages,
            "eval_data": _absolute_entries(config.eval_data),
        }
    )


def absolute_model(model: str, at: str) -> str:
    """A model folder as an absolute path; a Hub name as it is. Raises UserError for what can be neither."""
    if os.path.isdir(os.path.expanduser(model)):
        return _absolute(model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{at}: was {model!r}, which is neither a folder nor the name of a hub model")
    return model


def _absolute_models(multi: MultiSettings | None, file: str) -> MultiSettings | None:
    if multi is None:
        return None
    models = tuple(absolute_model(model, f"{file}: multi.models.{i}") for i, model in enumerate(multi.models))
    return multi.model_copy(update={"models": models})


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_stage(stage: StageConfig) -> StageConfig:
    source = stage.source
    if isinstance(source, RankedSource) and source.reward_model and os.path.isdir(_absolute(source.reward_model)):
        source = source.model_copy(update={"reward_model": _absolute(source.reward_model)})
    files = {"data": _absolute_entries(stage.data), "prompts": _absolute_files(stage.prompts)}
    return stage.model_copy(update={**files, "source": source})


def _absolute_entries(entries: tuple[str | DataEntry, ...] | None) -> tuple[str | DataEntry, ...] | None:
    return entries and tuple(
        _absolute_source(entry)
        if isinstance(entry, str)
        else entry.model_copy(update={"path": _absolute_source(entry.path)})
        for entry in entries
    )


def _absolute_files(sources: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return sources and tuple(_absolute_source(source) for source in sources)


def _absolute_source(source: str) -> str:
    return _absolute(source) if is_file_source(source) else source

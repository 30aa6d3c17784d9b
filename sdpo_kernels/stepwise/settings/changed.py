"""The settings of a run that differ from their defaults, for a reader who wants to see what is special about it.

    changed_settings(manifest["config"])      # {"model": "m", "beta": 0.05, "stages": [{"name": "easy", …}]}

Nothing is validated: the config may be that of an earlier version, with keys that are unknown now, or without some.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from sdpo_kernels.stepwise.settings.columns import ColumnSettings
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.post import ExpoSettings, PostSettings
from sdpo_kernels.stepwise.settings.reference import EmaSettings, MultiSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.source import SOURCES
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER

_SECTIONS: dict[str, type[BaseModel]] = {
    "columns": ColumnSettings,
    "lora": LoraSettings,
    "multi": MultiSettings,
    "ema": EmaSettings,
    "post": PostSettings,
    "post.expo": ExpoSettings,
}


def changed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (as JSON) without the settings that have their default value, and without nulls."""
    changed = _changed(RunConfig, config, "")

    # what a stage overrides is compared with nothing: its trainer has no defaults of its own
    trainer = config.get("trainer")
    if isinstance(trainer, dict):
        changed["trainer"] = _unlike(trainer, DEFAULT_TRAINER) or None
    stages = config.get("stages")
    if isinstance(stages, list):
        changed["stages"] = [_changed(StageConfig, stage, "") if isinstance(stage, dict) else stage for stage in stages]
    return _without_nulls(changed)


def _changed(section: type[BaseModel], values: dict[str, Any], at: str) -> dict[str, Any]:
    """The entries of a section that differ from the schema's defaults, sections within it included."""
    defaults = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in section.model_fields.items()
        if not field.is_required()
    }
    kept = _unlike(values, defaults)
    for key, value in kept.items():
        place = f"{at}.{key}" if at else key
        kind = value.get("kind", "") if key == "source" and isinstance(value, dict) else None
        below = _SECTIONS.get(place) if kind is None else SOURCES.get(kind)
        if below is not None and isinstance(value, dict):
            # a section that is there is a choice, even if all of it is default: `lora: {}`
            inner = _changed(below, value, place)
            kept[key] = {"kind": value["kind"], **inner} if "kind" in value else inner
    return kept


def _unlike(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in values.items() if key not in defaults or _plain(defaults[key]) != _plain(value)
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, models as dicts, as JSON has them."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _without_nulls(value: Any) -> Any:
    """`value` without the nulls in it, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(below) for below in value] if isinstance(value, list) else value

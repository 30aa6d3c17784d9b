"""The settings of a run that differ from their defaults, for a reader who wants to see what is special about it.

changed_settings(manifest["config"])      # {"model": "m", "beta": 0.05, "stages": [{"name": "easy", …}]}
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER


def changed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (as JSON) without the settings that have their default value, and without nulls.

    Of a config that this version refuses only the nulls are left out.
    """
    try:
        changed = RunConfig.model_validate(config).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        return _without_nulls(config)

    # its defaults are merged into what was set
    trainer = changed.pop("trainer", {})
    differing = {key: value for key, value in trainer.items() if DEFAULT_TRAINER.get(key, ...) != value}
    return _without_nulls(changed | ({"trainer": differing} if differing else {}))


def _without_nulls(value: Any) -> Any:
    """`value` without the nulls in it, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(below) for below in value] if isinstance(value, list) else value

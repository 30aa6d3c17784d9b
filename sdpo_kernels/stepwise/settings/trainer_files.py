"""Fields of `trainer` that may name a JSON file, such as DeepSpeed's config: what is in it counts, not where it is.

files = trainer_files(config)                      # {"zero2.json": {"zero_optimization": {"stage": 2}}}
with_content(config.model_dump(mode="json"), files)      # the same settings with the content in the file's place
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.settings.run_settings import RunConfig

_NAMED = ("deepspeed", "fsdp_config", "accelerator_config")


def trainer_files(config: RunConfig) -> dict[str, Any]:
    """The content of each JSON file that `trainer` names, by its name there; those that cannot be read are left out."""
    found: dict[str, Any] = {}
    for trainer in (config.trainer, *(stage.trainer or {} for stage in config.stages)):
        for name in (trainer.get(field) for field in _NAMED):
            if not isinstance(name, str):
                continue
            try:
                found[name] = json.loads(Path(name).read_text("utf-8"))
            except (OSError, ValueError):  # what reads it for training says what is wrong with it
                continue
    return found


def with_content(config: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    """A dumped config with the content of `files` in place of their names."""

    def filled(trainer: dict[str, Any] | None) -> dict[str, Any] | None:
        if not trainer:
            return trainer
        named = {field: trainer[field] for field in _NAMED if isinstance(trainer.get(field), str)}
        return trainer | {field: files[name] for field, name in named.items() if name in files}

    stages = [stage | {"trainer": filled(stage.get("trainer"))} for stage in config.get("stages", [])]
    return config | {"trainer": filled(config.get("trainer", {})), "stages": stages}

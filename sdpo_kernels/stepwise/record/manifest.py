"""What a run has done: manifest.json, written atomically, and metrics.jsonl, one logged step a line.

The manifest is the run's only truth: a stage is done when it says so. Its keys are those that `report.py` draws.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json, replace_file, sync, write_json
from sdpo_kernels.stepwise.settings.run_file import config_diff

Record = dict[str, Any]

# what a stage was planned from; a difference on an existing run is an error
PLANNED = ("name", "prompts", "pairs", "dropped", "data_hash", "beta", "loss", "reference", "policy")


@dataclass
class Manifest:
    """manifest.json of a run folder; change `data`, then `save`."""

    path: Path
    data: Record

    @classmethod
    def open(cls, run_dir: Path, header: Record, stages: list[Record]) -> Manifest:
        """The run's manifest, made new where there is none.

        Raises UserError, showing every difference, where the run was started with another config or other data.
        """
        path = run_dir / "manifest.json"
        if not path.exists():
            manifest = cls(path, {**header, "initial_eval": None, "stages": stages})
            manifest.save()
            return manifest
        data = read_json(path)
        differences = config_diff(*_comparable(data, header))
        if not differences:
            differences = config_diff(_plan(data), _plan(header | {"stages": stages}))
        if differences:
            raise UserError(started_otherwise(run_dir, differences))
        return cls(path, data)

    @property
    def stages(self) -> list[Record]:
        """One record a stage, in order."""
        return self.data["stages"]

    def update_stage(self, index: int, values: Record) -> None:
        """Change the record of stage `index` (from 1) and save."""
        self.stages[index - 1].update(values)
        self.save()

    def save(self) -> None:
        """Write the manifest, atomically."""
        write_json(self.path, self.data)


def started_otherwise(run_dir: Path, differences: list[str]) -> str:
    """What to say of a run folder whose config or data differ from what is asked for now."""
    head = f"{run_dir} holds a run that was started otherwise; choose another output_dir, or go back to the values on"
    return f"{head} the left:\n  " + "\n  ".join(differences)


def _comparable(data: Record, header: Record) -> tuple[Record, Record]:
    """Both configs; with other numbers of processes the pairs a step stand for the settings that they come from."""
    before, now = (record.get("environment", {}).get("world_size", 1) for record in (data, header))
    configs = data.get("config", {}), header["config"]
    return configs if before == now else (_of_steps(configs[0], before), _of_steps(configs[1], now))


def _of_steps(config: Record, processes: int) -> Record:
    factors = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

    def changed(settings: Record) -> Record:
        effective = factors | config.get("trainer", {}) | settings
        rest = {key: value for key, value in settings.items() if key not in factors}
        return rest | {" x ".join([*factors, "processes"]): math.prod(effective[key] for key in factors) * processes}

    stages = [stage | {"trainer": changed(stage.get("trainer") or {})} for stage in config.get("stages", [])]
    return config | {"trainer": changed(config.get("trainer", {})), "stages": stages}


def _plan(data: Record) -> Record:
    """What of a manifest must not change: its stages by name, so that a difference reads well."""
    stages = {stage["name"]: planned(stage) for stage in data.get("stages", [])}
    return {"eval_data_hash": data.get("eval_data_hash"), "order of stages": list(stages), **stages}


def planned(stage: Record) -> Record:
    """What of a stage's record was fixed before it was trained."""
    made = stage.get("prompts") is not None  # its pairs are counted when they have been made
    return {key: stage.get(key) for key in PLANNED if not (made and key in ("pairs", "dropped"))}


class MetricsFile:
    """metrics.jsonl: appended to line by line; lines past a checkpoint are dropped when a stage resumes there."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"

    def append(self, line: Record) -> None:
        """Add one line; a kill in the middle leaves a half line, which `rewind` clears away."""
        if not ranks.is_first():
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def lines(self) -> list[Record]:
        """The whole lines there are."""
        if not self.path.exists():
            return []
        return [line for text in self.path.read_text("utf-8").splitlines() if (line := _parse(text)) is not None]

    def rewind(self, stage: int, step: int | None) -> None:
        """Keep the lines of stages before `stage` (from 1) and those of `stage` up to `step`; None: none of its own."""
        kept = [
            line
            for line in self.lines()
            if line["stage/index"] < stage
            or (step is not None and line["stage/index"] == stage and line["step"] <= step)
        ]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        if ranks.is_first() and self.path.exists():
            sync(self.path)

    def of_stage(self, stage: int) -> list[Record]:
        """The training lines of a stage (from 1), without its evaluations."""
        return [line for line in self.lines() if line["stage/index"] == stage and "loss" in line]


def _parse(text: str) -> Record | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "stage/index" in line and "step" in line else None


def host_environment(threads: int, device: str, seed: int) -> Record:
    """What the bits of a run depend on beside config and data."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
        "device": device,
        "seed": seed,
        "world_size": ranks.world_size(),
        "host_cores": os.cpu_count(),
    }

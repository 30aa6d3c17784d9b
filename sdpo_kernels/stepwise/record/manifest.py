"""What a run has done: manifest.json, written atomically, and metrics.jsonl, one logged step a line.

The manifest alone decides what is done: a stage is finished once its record in the manifest says so. The report reads
the same keys.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json, replace_file, sync, write_json
from sdpo_kernels.stepwise.settings.run_file import config_diff, with_new_defaults

Record = dict[str, Any]

# the keys of a stage's record that are fixed before it trains; on an existing run a difference is an error
PLANNED = ("name", "prompts", "pairs", "dropped", "data_hash", "beta", "loss", "reference", "policy")


@dataclass
class Manifest:
    """manifest.json of a run folder; change `data`, then `save`."""

    path: Path
    data: Record

    @classmethod
    def open(cls, run_dir: Path, header: Record, stages: list[Record]) -> Manifest:
        """The run's manifest, created if there is none.

        Raises:
            UserError: the run was started with another config or other data; the message lists every difference.
        """
        path = run_dir / "manifest.json"
        if not path.exists():
            manifest = cls(path, {**header, "initial_eval": None, "stages": stages})
            manifest.save()
            return manifest

        # config first: another config usually changes the stages too, and is what the user can put back
        data = read_json(path)
        differences = config_diff(*_comparable(data, header))
        if not differences:
            differences = config_diff(_plan(data), _plan(header | {"stages": stages}))
        if differences:
            raise UserError(different_settings(run_dir, differences))
        return cls(path, data)

    @property
    def stages(self) -> list[Record]:
        """One record per stage, in order."""
        return self.data["stages"]

    def update_stage(self, index: int, values: Record) -> None:
        """Change the record of stage `index` (from 1) and save."""
        self.stages[index - 1].update(values)
        self.save()

    def save(self) -> None:
        """Write the manifest, atomically."""
        write_json(self.path, self.data)


def different_settings(run_dir: Path, differences: list[str]) -> str:
    """The error message for a run folder whose config or data differ from the current ones."""
    return (
        f"{run_dir} already contains a run with different settings; choose another output_dir, or go back to the "
        "values on the left:\n  " + "\n  ".join(differences)
    )


def _comparable(data: Record, header: Record) -> tuple[Record, Record]:
    """Both configs. If the numbers of processes differ, the pairs per step replace the settings they depend on."""
    before, now = (record.get("environment", {}).get("world_size", 1) for record in (data, header))
    configs = with_new_defaults(data.get("config", {})), header["config"]
    return configs if before == now else (_of_steps(configs[0], before), _of_steps(configs[1], now))


def _of_steps(config: Record, processes: int) -> Record:
    """`config` with the pairs per step in place of batch size and gradient accumulation, for each stage too."""
    factors = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

    def changed(settings: Record) -> Record:
        # a stage's own trainer settings override the run's
        effective = factors | config.get("trainer", {}) | settings
        rest = {key: value for key, value in settings.items() if key not in factors}
        return rest | {" x ".join([*factors, "processes"]): math.prod(effective[key] for key in factors) * processes}

    stages = [stage | {"trainer": changed(stage.get("trainer") or {})} for stage in config.get("stages", [])]
    return config | {"trainer": changed(config.get("trainer", {})), "stages": stages}


def _plan(data: Record) -> Record:
    """The parts of a manifest that must not change; stages by name, so that a difference names its stage."""
    stages = {stage["name"]: planned(stage) for stage in data.get("stages", [])}
    return {"eval_data_hash": data.get("eval_data_hash"), "order of stages": list(stages), **stages}


def planned(stage: Record) -> Record:
    """The part of a stage's record that is fixed before it trains."""
    generated = stage.get("prompts") is not None  # its pairs are counted once they are generated
    return {key: stage.get(key) for key in PLANNED if not (generated and key in ("pairs", "dropped"))}


class MetricsFile:
    """metrics.jsonl: appended to line by line; when a stage resumes, the lines past its checkpoint are dropped."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"

    def append(self, line: Record) -> None:
        """Add one line; only rank 0 writes. A kill may leave half a line, which `rewind` removes."""
        if not ranks.is_first():
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def lines(self) -> list[Record]:
        """All complete lines."""
        if not self.path.exists():
            return []
        return [line for text in self.path.read_text("utf-8").splitlines() if (line := _parse(text)) is not None]

    def rewind(self, stage: int, step: int | None) -> None:
        """Keep the lines of earlier stages and those of `stage` (from 1) up to `step`; with None, none of `stage`."""
        kept = [
            line
            for line in self.lines()
            if line["stage/index"] < stage
            or (step is not None and line["stage/index"] == stage and line["step"] <= step)
        ]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def sync(self) -> None:
        """fsync the file."""
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

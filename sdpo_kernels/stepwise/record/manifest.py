"""What a run has done: manifest.json, written atomically, and metrics.jsonl, one logged step a line.

The manifest alone decides what is done: a stage is finished once its record in the manifest says so. The report reads
the same keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json, replace_file, sync, write_json
from sdpo_kernels.stepwise.record.changes import FILES, Record, processes_of, refused_changes, started_stages


@dataclass
class Manifest:
    """manifest.json of a run folder; change `data`, then `save`."""

    path: Path
    data: Record

    @classmethod
    def open(cls, run_dir: Path, header: Record, stages: list[Record]) -> Manifest:
        """The run's manifest, created if there is none, brought up to the present settings if there is one.

        Stages that have started keep their records; the others are those of `stages`. Evaluations on other data than
        the present are dropped, so that they are made again.

        Raises:
            UserError: weights depend on settings or data that have changed; the message lists every difference.
        """
        path = run_dir / "manifest.json"
        if not path.exists():
            manifest = cls(path, {**header, "initial_eval": None, "stages": stages})
            manifest.save()
            return manifest

        before = read_json(path)
        if lines := refused_changes(before, header, stages):
            raise UserError(different_settings(run_dir, lines))

        manifest = cls(path, _brought_up(before, header, stages))
        if manifest.data != before:
            manifest.save()
        return manifest

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


def _brought_up(before: Record, header: Record, stages: list[Record]) -> Record:
    """The manifest `before` with the present settings, and the records in `stages` of stages that have not started."""
    started = len(started_stages(before))
    if not started and before.get("config") != header["config"]:
        return {**header, "initial_eval": None, "stages": stages}  # nothing is trained yet: a new run

    data = before | {"config": header["config"], "stages": [*before["stages"][:started], *stages[started:]]}
    data.pop(FILES, None)
    if FILES in header:
        data[FILES] = header[FILES]
    if processes_of(header) != processes_of(before):
        data["processes"] = processes_of(header)
    if header["eval_data_hash"] not in (None, before.get("eval_data_hash")):
        data |= {"eval_data_hash": header["eval_data_hash"], "initial_eval": None}
        data["stages"] = [stage | {"eval": None} for stage in data["stages"]]
    return data


def different_settings(run_dir: Path, differences: list[str]) -> str:
    """The error message for a run folder whose config or data differ from the current ones."""
    return (
        f"{run_dir} already contains a run with different settings; choose another output_dir, or go back to the "
        "values on the left:\n  " + "\n  ".join(differences)
    )


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

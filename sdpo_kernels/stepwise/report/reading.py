"""Reading a run folder for the report: any moment of a run, any version, files that were cut off or edited.

run = read_run(Path("runs/quick"))
run.manifest, run.lines
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.report.drawing import finite

Record = dict[str, Any]

# what table and pictures read from a stage must be numbers; other keys may have any form
STAGE_NUMBERS = (
    "pairs", "pairs_used", "dropped", "cut_pairs", "lost_tokens", "steps", "first_loss", "last_loss", "gamma_reference",
    "seconds", "peak_memory_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder: its manifest, metrics by step, the numbers of unreadable metrics lines, config.yaml's text."""

    folder: Path
    manifest: Record
    lines: list[Record]
    unreadable: list[int]
    config: str


def read_run(run_dir: Path) -> Run:
    """Read a run folder; a UserError names the file and what is wrong with it."""
    folder = Path(run_dir)
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no manifest.json; give the output_dir of a run of `sdpo train`")

    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    check_manifest(manifest, str(path))

    # both may be missing: metrics before the first step, the config in a copied folder
    lines, unreadable = read_metrics(folder / "metrics.jsonl", {stage["index"] for stage in manifest["stages"]})
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return Run(folder, manifest, lines, unreadable, text)


def check_manifest(manifest: object, where: str) -> None:
    """Raise UserError unless `manifest` has the form that the report relies on."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), list):
        raise UserError(f'{where}: must be a JSON object with a list "stages"')

    # only what the table and the pictures read: other keys may have any form
    for place, stage in enumerate(manifest["stages"]):
        here = f"{where}: stages[{place}]"
        if not isinstance(stage, dict):
            raise UserError(f"{here} is {stage!r}, must be an object")
        if not isinstance(stage.get("name"), str) or stage.get("index") != place + 1:
            raise UserError(f'{here} must have a "name" (text) and "index": {place + 1}')
        check_numbers(stage, STAGE_NUMBERS, here)
        check_scores(stage.get("eval"), f"{here}.eval")
    check_scores(manifest.get("initial_eval"), f"{where}: initial_eval")


def check_scores(scores: object, where: str) -> None:
    """Raise UserError unless `scores` is null or an object of numbers and nulls."""
    if scores is not None and not isinstance(scores, dict):
        raise UserError(f"{where} is {scores!r}, must be an object or null")
    check_numbers(scores or {}, list(scores or {}), where)


def check_numbers(values: Record, keys: Sequence[str], where: str) -> None:
    """Raise UserError unless each of `keys` is a number, null or absent."""
    for key in keys:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{where}.{key} is {value!r}, must be a number or null")


def read_metrics(path: Path, stages: set[int]) -> tuple[list[Record], list[int]]:
    """The readable lines of metrics.jsonl, sorted by step, and the numbers of the unreadable ones.

    A killed run may leave half a line at the end. Lines of the same step are merged, and later values win: a resumed
    run may log a step twice, and Trainer's final line repeats the last step without its loss.
    """
    if not path.is_file():
        return [], []

    # an evaluation after a step is a record of its own
    found: dict[tuple[int, bool], Record] = {}
    unreadable: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for place, text in enumerate(stream, 1):
            line = parse_metrics_line(text, stages)
            if line is None:
                unreadable.append(place)
            elif line:
                key = (line["stage/global_step"], "eval_loss" in line)
                found[key] = found.get(key, {}) | line

    return [found[key] for key in sorted(found)], unreadable


def parse_metrics_line(text: str, stages: set[int]) -> Record | None:
    """One line of metrics.jsonl: {} if blank, None if it is not a logged step of one of `stages`."""
    if not text.strip():
        return {}
    try:
        line = json.loads(text)
    except ValueError:
        return None

    # edited or foreign lines may hold anything
    index = line.get("stage/index") if isinstance(line, dict) else None
    if not isinstance(index, int) or index not in stages:
        return None
    return line if finite(line.get("stage/global_step")) and finite(line.get("step")) else None

"""The report of a run: pictures as PNG files, one self-contained report.html, and the table for the terminal.

    write_report(Path("runs/quick"))          # finished or not; call it as often as you like
    rich.print(stage_table(manifest))

The page embeds its pictures, runs no script and loads nothing: it can be mailed, or opened years later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.common.units import write_bytes, write_seconds
from sdpo_kernels.stepwise.record.expo_record import expo_line
from sdpo_kernels.stepwise.report.drawing import finite, model_name, number
from sdpo_kernels.stepwise.report.page import NOTHING, html_page, html_picture, html_table
from sdpo_kernels.stepwise.report.pictures import run_pictures

Record = dict[str, Any]

CAPTIONS = {
    "loss.png": "Training loss. A stage that starts from its own reference starts at ln 2.",
    "reward_margin.png": "Mean reward of chosen minus rejected answers, relative to the stage's reference.",
    "reward_accuracy.png": "Share of a batch's pairs whose chosen answer has the higher reward; ties count as wrong.",
    "gamma_reference.png": "How much each stage's reference prefers the chosen answers of that stage's pairs.",
    "eval_accuracy.png": "Share of evaluation pairs that each model ranks correctly, without a reference.",
    "eval_gamma.png": "How much each model prefers the chosen answers of the evaluation pairs.",
    "time.png": "Wall time of each stage.",
    "memory.png": "Peak memory of each stage.",
}


@dataclass(frozen=True)
class Run:
    """A run folder: its manifest, metrics by step, the numbers of unreadable metrics lines, config.yaml's text."""

    folder: Path
    manifest: Record
    lines: list[Record]
    unreadable: list[int]
    config: str


def write_report(run_dir: Path) -> list[Path]:
    """Write the pictures of the run in `run_dir` and report.html; returns the paths of these files.

    Works at any moment of a run; a picture appears once there is data for it. Older files are replaced, each in one
    step. UserError: no run in the folder, an unreadable manifest, a folder that cannot be written.

    1. Read manifest, metrics and config.
    2. Draw the pictures that have data, and the page that embeds them.
    3. Write them.
    """
    run = read_run(run_dir)
    pictures = run_pictures(run.manifest, run.lines)
    files = {**pictures, "report.html": report_page(run, pictures).encode("utf-8", "replace")}

    for name, content in files.items():
        replace_file(run.folder / name, content)
    return [run.folder / name for name in files]


def stage_table(manifest: Record) -> Table:
    """The stages of a manifest as a table for a terminal of 80 columns; the same values as in report.html."""
    check_manifest(manifest, "manifest")
    columns, rows = table_cells(manifest)
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold", pad_edge=False, collapse_padding=True
    )

    # short titles over several lines: numbers never wrap, only the stage's name does
    for column in columns:
        title = column.title.replace("accuracy", "acc.").replace("reference", "ref.").replace(" ", "\n")
        if column.text:
            table.add_column(title, min_width=8)
        else:
            table.add_column(title, justify="right", no_wrap=True)

    # as Text, because a stage's name may look like markup: "[red]"
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


# ---- reading ----


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
        check_numbers(stage, [column.key for column in COLUMNS if not column.scores and not column.text], here)
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


# ---- the table ----


@dataclass(frozen=True)
class Column:
    """A column: `key` of the stage or, with `scores`, of its evaluation; `text` is aligned left.

    The column is left out if every stage has the `usual` value or none.
    """

    title: str
    key: str
    write: Callable[[Any], str]
    scores: bool = False
    text: bool = False
    usual: Any = None


COLUMNS = (
    Column("stage", "name", str, text=True),
    Column("pairs", "pairs", "{:,}".format),
    Column("dropped", "dropped", "{:,}".format, usual=0),
    Column("cut pairs", "cut_pairs", "{:,}".format, usual=0),
    Column("lost tokens", "lost_tokens", "{:,}".format, usual=0),
    Column("steps", "steps", "{:,}".format),
    Column("first loss", "first_loss", "{:.4f}".format),
    Column("last loss", "last_loss", "{:.4f}".format),
    Column("eval accuracy", "pair_accuracy", "{:.3f}".format, scores=True),
    Column("eval margin", "reward_margin", number, scores=True),
    Column("γ reference", "gamma_reference", number),
    Column("time", "seconds", write_seconds),
    Column("peak memory", "peak_memory_bytes", write_bytes),
)


def table_cells(manifest: Record) -> tuple[list[Column], list[list[str]]]:
    """(columns, rows of text): M₀ if it was scored, then the stages; columns without information are left out."""
    # M₀ has scores but no stage
    stages = manifest["stages"]
    sources = [(stage, stage.get("eval") or {}, stage_name(stage)) for stage in stages]
    if manifest.get("initial_eval"):
        sources.insert(0, ({}, manifest["initial_eval"], f"{model_name(0)} (start)"))

    # column by column, as each decides for itself whether it is shown
    columns, cells = [], []
    for column in COLUMNS:
        values = [(scores if column.scores else stage).get(column.key) for stage, scores, _ in sources]
        if column.key == "name":
            written = [name for _, _, name in sources]
        else:
            written = [cell(column, value) for value in values]
        if column.key == "name" or any(value not in (None, column.usual) for value in values):
            columns.append(column)
            cells.append(written)

    return columns, [list(row) for row in zip(*cells, strict=True)]


def stage_name(stage: Record) -> str:
    """A stage's number and name, and its state unless it is done."""
    state = stage.get("state", "done")
    return f"{stage['index']} {stage['name']}" + ("" if state == "done" else f" ({state})")


def cell(column: Column, value: Any) -> str:
    """`value` as the column formats it; a dash for None, and "nan" or "inf" as they are."""
    if value is None:
        return NOTHING
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return column.write(value)


# ---- the page ----


def report_page(run: Run, pictures: dict[str, bytes]) -> str:
    """The text of report.html: headline, summary, table, pictures, and the config."""
    columns, rows = table_cells(run.manifest)
    parts = [
        f"<h1>{escape(run.folder.resolve().name)}</h1>",
        summary(run),
        html_table([(column.title, column.text) for column in columns], rows),
        '<div class="pictures">',
        *[html_picture(png, CAPTIONS[name]) for name, png in pictures.items()],
        "</div>",
    ]

    # gaps are stated, not hidden
    if not pictures:
        parts.append("<p>No step has been logged yet, so there is nothing to draw.</p>")
    if run.unreadable:
        places = ", ".join(map(str, run.unreadable[:10])) + (" …" if len(run.unreadable) > 10 else "")
        parts.append(f"<p>Left out of metrics.jsonl, not readable as logged steps: line {places}.</p>")

    if run.config:
        parts.append(f"<h2>config.yaml</h2><pre>{escape(run.config)}</pre>")
    return html_page(f"sdpo: {run.folder.resolve().name}", "\n".join(parts))


def summary(run: Run) -> str:
    """The lines under the headline: progress, model, date, environment, and ExPO's result."""
    manifest = run.manifest
    stages = manifest["stages"]

    # an edited or old manifest may lack any of these
    done = sum(stage.get("state") == "done" for stage in stages)
    facts = [f"{done} of {len(stages)} stages done"]
    facts += [
        f"{label} {manifest[key]}" for key, label in (("model", "model"), ("created", "started")) if manifest.get(key)
    ]

    environment = manifest.get("environment")
    settings = [f"{key} {value}" for key, value in environment.items()] if isinstance(environment, dict) else []
    lines = [" · ".join(facts), " · ".join(settings), expo_line(manifest)]
    return "".join(f'<p class="facts">{escape(line)}</p>' for line in lines if line)

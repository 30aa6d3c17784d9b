"""The table of stages: the same cells for report.html and for the terminal.

rich.print(stage_table(manifest))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sdpo_kernels.stepwise.common.units import write_seconds
from sdpo_kernels.stepwise.report.drawing import memory_unit, model_name, numbers
from sdpo_kernels.stepwise.report.page import NOTHING
from sdpo_kernels.stepwise.report.pictures import with_half_ties
from sdpo_kernels.stepwise.report.reading import check_manifest

Record = dict[str, Any]


def each(write: Callable[[Any], str]) -> Callable[[Sequence[Any]], list[str]]:
    """A writer of a column's values that writes each by itself."""
    return lambda values: [write(value) for value in values]


def sizes(values: Sequence[float]) -> list[str]:
    """Sizes in bytes in one unit, with enough digits to tell them apart."""
    divisor, unit = memory_unit(max(values))
    return [f"{text} {unit}" for text in numbers([value / divisor for value in values])]


@dataclass(frozen=True)
class Column:
    """A column: `key` of the stage or, with `scores`, of its evaluation; `text` is aligned left.

    `write` turns all values of the column into text together, so that they have one number of decimals; `about`
    explains the column in one line. The column is left out if every stage has the `usual` value, or that of its key
    `same_as`, or none; one that is `page_only` has no room in a terminal.
    """

    title: str
    key: str
    write: Callable[[Sequence[Any]], list[str]]
    about: str = ""
    scores: bool = False
    text: bool = False
    usual: Any = None
    same_as: str = ""
    page_only: bool = False


COLUMNS = (
    Column("stage", "name", each(str), text=True),
    Column("pairs", "pairs", each("{:,}".format), "preference pairs of the stage"),
    Column(
        "used",
        "pairs_used",
        each("{:,}".format),
        "pairs that its steps train on; the reference scores only these",
        same_as="pairs",
    ),
    Column(
        "skipped rows",
        "skipped",
        each("{:,}".format),
        "bad rows of the data files, left out (on_bad_row: skip)",
        usual=0,
        page_only=True,
    ),
    Column(
        "dropped",
        "dropped",
        each("{:,}".format),
        "pairs left out: nothing to compare is left of them, or the chat template refuses them",
        usual=0,
    ),
    Column("cut pairs", "cut_pairs", each("{:,}".format), "pairs longer than max_length, cut at one end", usual=0),
    Column("lost tokens", "lost_tokens", each("{:,}".format), "answer tokens that were cut off", usual=0),
    Column("steps", "steps", each("{:,}".format), "updates of the weights"),
    Column("first loss", "first_loss", each("{:.4f}".format), "training loss at the first logged step"),
    Column("last loss", "last_loss", each("{:.4f}".format), "training loss at the last logged step"),
    Column(
        "pair accuracy",
        "pair_accuracy",
        each("{:.3f}".format),
        "share of evaluation pairs where the model's log-prob of the chosen answer is higher; equal ones count half",
        scores=True,
    ),
    Column(
        "reward accuracy",
        "reward_accuracy",
        each("{:.3f}".format),
        "share of evaluation pairs where the reward β·(log π − log π of M₀) of the chosen answer is higher",
        scores=True,
        page_only=True,
    ),
    Column(
        "reward margin",
        "reward_margin",
        numbers,
        "mean of that reward of chosen minus rejected, on the evaluation pairs",
        scores=True,
    ),
    Column(
        "reference margin",
        "gamma_reference",
        numbers,
        "log-prob margin of the stage's reference on the pairs it scores: mean of log π(chosen) − log π(rejected), in "
        "nat (one nat less is 2.7 times less likely)",
    ),
    Column(
        "time",
        "seconds",
        each(write_seconds),
        "wall time of the stage, over all starts",
    ),
    Column("peak memory", "peak_memory_bytes", sizes, "highest memory during the stage"),
)


def table_cells(manifest: Record) -> tuple[list[Column], list[list[str]]]:
    """(columns, rows of text): M₀ if it was scored, then the stages; columns without information are left out."""
    # M₀ has scores but no stage
    stages = manifest["stages"]
    sources = [(stage, with_half_ties(stage.get("eval") or {}), stage_name(stage)) for stage in stages]
    if manifest.get("initial_eval"):
        sources.insert(0, ({}, with_half_ties(manifest["initial_eval"]), f"{model_name(0)} (start)"))

    # column by column, as each decides for itself whether it is shown
    columns, cells = [], []
    for column in COLUMNS:
        values = [(scores if column.scores else stage).get(column.key) for stage, scores, _ in sources]
        written = [name for _, _, name in sources] if column.key == "name" else cells_of(column, values)
        usual = [stage.get(column.same_as) if column.same_as else column.usual for stage, _, _ in sources]
        if column.key == "name" or any(v not in (None, known) for v, known in zip(values, usual, strict=True)):
            columns.append(column)
            cells.append(written)

    return columns, [list(row) for row in zip(*cells, strict=True)]


def stage_name(stage: Record) -> str:
    """A stage's number and name, and its state unless it is done."""
    state = stage.get("state", "done")
    return f"{stage['index']} {stage['name']}" + ("" if state == "done" else f" ({state})")


def cells_of(column: Column, values: Sequence[Any]) -> list[str]:
    """The column's cells; a dash for None, and "nan" or "inf" as they are."""
    known = [place for place, value in enumerate(values) if value is not None and math.isfinite(value)]
    cells = [NOTHING if value is None else str(value) for value in values]
    if known:
        for place, text in zip(known, column.write([values[place] for place in known]), strict=True):
            cells[place] = text
    return cells


def stage_table(manifest: Record) -> Table:
    """The stages of a manifest as a table for a terminal of 80 columns; the values are those of report.html."""
    check_manifest(manifest, "manifest")
    columns, rows = table_cells(manifest)
    shown = [place for place, column in enumerate(columns) if not column.page_only]
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold", pad_edge=False, collapse_padding=True
    )

    # short titles over several lines: numbers never wrap, only the stage's name does
    for column in [columns[place] for place in shown]:
        title = column.title.replace("accuracy", "acc.").replace("reference", "ref.").replace("margin", "marg.")
        title = title.replace("reward", "rew.").replace(" ", "\n")
        if column.text:
            table.add_column(title, min_width=8)
        else:
            table.add_column(title, justify="right", no_wrap=True)

    # as Text, because a stage's name may look like markup: "[red]"
    for row in rows:
        table.add_row(*[Text(row[place]) for place in shown])
    return table

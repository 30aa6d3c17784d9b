"""The demo's results: judge each model on held-out words, then write a table, a picture, a page and results.json.

judged = [judge("SFT", folder, start.heldout, settings), ...]
write_results(Path("runs/demo"), judged, gammas, settings)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from examples.demo.evaluate import difference, exactly_right, pair_gammas
from examples.demo.setup import HELDOUT, Settings
from sdpo_kernels.stepwise.report.comparison import comparison_html, comparison_picture
from sdpo_kernels.stepwise.starter.letters import SOURCES, draw_words
from sdpo_kernels.stepwise.starter.tiny_model import load

TITLE = "Sorting letters: the warm start, DPO on all pairs at once, stepwise DPO"
NOTE = (
    "A Llama with 0.3 million parameters was warmed up on the answers of two authors, one of whom leaves a word's last "
    "letter in place; its own wrong answers are the rejected ones of the pairs. DPO and sDPO start from it and see the "
    "same pairs in the same number of updates. Log-prob margin of the reference: how much more likely, in nat, the "
    "reference finds the chosen answers of a stage's training pairs than the rejected ones; for SFT, its value if "
    "every stage kept the warm start as its reference. One run, one seed."
)


@dataclass(frozen=True)
class Judged:
    """A model's held-out results by source: `right` bool [prompts], `ranked` bool [pairs]."""

    name: str
    right: dict[str, torch.Tensor]
    ranked: dict[str, torch.Tensor]

    def share(self, results: dict[str, torch.Tensor], source: str | None = None) -> float:
        """The share of a source, or of all sources together; every prompt or pair has the same weight."""
        taken = torch.cat(list(results.values())) if source is None else results[source]
        return taken.double().mean().item()


def judge(name: str, folder: Path, heldout: dict[str, list[dict[str, str]]], settings: Settings) -> Judged:
    """Judge the model in `folder`: its greedy answers to held-out prompts, and its ranking of held-out pairs."""
    model, tokenizer = load(folder)
    right = {
        source.name: exactly_right(
            model, tokenizer, draw_words(source, HELDOUT, settings.heldout_prompts, settings.seed)
        )
        for source in SOURCES
    }
    return Judged(name, right, {source: pair_gammas(model, tokenizer, pairs) > 0 for source, pairs in heldout.items()})


def result_rows(judged: Sequence[Judged], gammas: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row per model, in the form that comparison.py draws; `gammas` has {stage: log-prob margin} of each."""
    rows = []
    for model in judged:
        row: dict[str, Any] = {"name": model.name}

        # by source for the picture, and overall for the terminal
        for key, counts, results in (
            ("pair_accuracy", "pairs", model.ranked),
            ("exactly_right", "prompts", model.right),
        ):
            row[key] = {source: model.share(results, source) for source in results}
            row[f"{key}_overall"] = model.share(results)
            row[counts] = {source: len(values) for source, values in results.items()}

        rows.append(row | {"gamma_reference": gammas[model.name]})
    return rows


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The shares as a table for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    table.add_column("held-out words", no_wrap=True)
    keys = (("pair_accuracy", "pairs ranked right"), ("exactly_right", "answers exactly right"))
    for row in rows:
        table.add_column(row["name"], justify="right")

    for key, title in keys:
        table.add_row(title, *(f"{row[f'{key}_overall']:.1%}" for row in rows), style="bold")
        for source in SOURCES:
            table.add_row(f"  {source.letters} letters", *(f"{row[key][source.name]:.1%}" for row in rows))
    return table


def gamma_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Log-prob margins of the references: the warm start on each source's pairs, and each sDPO stage's reference."""
    by_name = {row["name"]: row["gamma_reference"] for row in rows}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    table.add_column("reference's log-prob margin (nat)")
    for stage in by_name["sDPO"]:
        table.add_column(stage, justify="right")
    table.add_column("all", justify="right")

    # on the same pairs, so that the two rows can be compared column by column
    table.add_row(
        "the warm start (DPO's reference)",
        *(f"{value:.2f}" for value in by_name["SFT"].values()),
        f"{by_name['DPO']['all']:.2f}",
    )
    table.add_row("sDPO's reference of that stage", *(f"{value:.2f}" for value in by_name["sDPO"].values()), "")
    return table


def difference_lines(judged: Sequence[Judged]) -> list[str]:
    """Differences in exactly right answers between the models, with their 95 % intervals over the prompts."""
    right = {model.name: torch.cat(list(model.right.values())) for model in judged}
    lines = []
    for one, other in (("DPO", "SFT"), ("sDPO", "SFT"), ("sDPO", "DPO")):
        mean, reach = difference(right[one], right[other])
        verdict = "" if abs(mean) > reach else ": no difference that this run shows"
        lines.append(f"{one} - {other}: {mean * 100:+.1f} ± {reach * 100:.1f} points{verdict}")
    return lines


def write_results(folder: Path, judged: Sequence[Judged], rows: Sequence[dict[str, Any]], settings: Settings) -> Path:
    """Write results.json, comparison.png and comparison.html to `folder`; returns the path of the page."""
    lines = difference_lines(judged)
    record = {"rows": rows, "differences": lines, "seed": settings.seed}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    # the warm start is DPO's reference: draw its γ on each source's pairs next to that of sDPO's references
    warm_start = next(row["gamma_reference"] for row in rows if row["name"] == "SFT")
    own = {"SFT": None, "DPO": warm_start}
    drawn = [row | {"gamma_reference": own.get(row["name"], row["gamma_reference"])} for row in rows]

    picture = comparison_picture(folder / "comparison.png", drawn, TITLE)
    note = f"{NOTE} Exactly right, difference and its 95 % interval over the prompts: {'; '.join(lines)}."
    return comparison_html(folder / "comparison.html", rows, TITLE, picture, note)

"""The texts in the page: answers to evaluation prompts before and after each stage, and pairs a stage generated.

Nothing is generated here: `sdpo train` has written the files (setting `samples`, and stages with `prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sdpo_kernels.stepwise.record.samples import PAIRS_FILE, SAMPLES_FILE, read_texts
from sdpo_kernels.stepwise.report.drawing import model_name
from sdpo_kernels.stepwise.report.reading import Record, Run
from sdpo_kernels.stepwise.report.terms import MODELS

MOST_PROMPTS, MOST_PAIRS, MOST_LETTERS = 20, 2, 600


def samples_part(run: Run) -> str:
    """The part of the page with texts; "" if the run has none."""
    folders = [(stage, run.folder / f"stage-{stage['index']}-{stage['name']}") for stage in run.manifest["stages"]]
    return answers_part(run.folder, folders) + pairs_part(folders)


def answers_part(folder: Path, stages: Sequence[tuple[Record, Path]]) -> str:
    """By prompt, the answers of M₀ and of the model after each stage."""
    models = [(f"{model_name(0)} (start)", folder)]
    models += [(f"{model_name(stage['index'])} ({stage['name']})", path) for stage, path in stages]

    # by prompt, because the evaluation data may have changed between two models
    answers: dict[str, list[tuple[str, str]]] = {}
    for name, path in models:
        for row in read_texts(path / SAMPLES_FILE, ("prompt", "answer"), MOST_PROMPTS):
            end = "" if row.get("ended", True) else " …"
            answers.setdefault(row["prompt"], []).append((name, row["answer"] + end))
    if not answers:
        return ""

    note = f"Greedy answers to the first evaluation prompts (setting samples); … : cut. {MODELS}"
    parts = [f'<h2>Answers before and after</h2><p class="facts">{escape(note)}</p>']
    for prompt, given in answers.items():
        parts.append(texts_block([("prompt", prompt), *given]))
    return "\n".join(parts)


def pairs_part(stages: Sequence[tuple[Record, Path]]) -> str:
    """The first pairs of each stage that generated its own."""
    parts = []
    for stage, path in stages:
        if stage.get("prompts") is None:
            continue
        for row in read_texts(path / PAIRS_FILE, ("prompt", "chosen", "rejected"), MOST_PAIRS):
            texts = [(key, row[key]) for key in ("prompt", "chosen", "rejected")]
            parts.append(f"<h3>{escape(stage['name'])}</h3>{texts_block(texts)}")
    note = '<h2>Generated pairs</h2><p class="facts">The first pairs that each stage generated.</p>'
    return "\n".join([note, *parts]) if parts else ""


def texts_block(texts: Sequence[tuple[str, str]]) -> str:
    """One box with (name, text) line by line; long texts are cut."""
    cut = [(name, text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " …") for name, text in texts]
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in cut)
    return f'<dl class="texts">{lines}</dl>'

"""Whether the rows of a run are plain text or conversations: what to say about it before training.

    notes, warnings = format_messages({"stage a": pairs, "eval_data": others}, has_template=True)

A chat template is used for conversations only. Plain text trains a chat model in a format that it is never used in, and
evaluation in one format says little about training in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.prompts import PromptRow

Rows = Sequence[Pair] | Sequence[PromptRow]


def format_messages(parts: Mapping[str, Rows], *, has_template: bool) -> tuple[list[str], list[str]]:
    """(notes, warnings) about the rows of each part of a run, by its name."""
    plain, chat = (_named(parts, conversational=kind) for kind in (False, True))
    if plain and chat:
        text = "the model is trained or evaluated in two formats; write all rows in the same one (docs/data.md)"
        return [], [f"plain text in {plain}, conversations in {chat}: {text}"]
    if plain and has_template:
        text = "to train a chat model, write conversations, or name a system column (docs/data.md)"
        return [f"plain text in {plain}: the tokenizer's chat template is not used; {text}"], []
    return [], []


def _named(parts: Mapping[str, Rows], *, conversational: bool) -> str:
    """The parts that have such rows, with the counts where only some are."""
    counts = {name: sum(row.is_conversational == conversational for row in rows) for name, rows in parts.items()}
    return ", ".join(
        name if count == len(parts[name]) else f"{name} ({count:,} of {len(parts[name]):,} rows)"
        for name, count in counts.items()
        if count
    )

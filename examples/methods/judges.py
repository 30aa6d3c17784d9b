"""Judges for the demo's task, used by sources as `judge: examples.methods.judges:letters_in_place`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def letters_in_place(rows: Sequence[dict[str, Any]], completions: Sequence[str]) -> list[float]:
    """The share of letters in the right place; extra letters cost as much as wrong ones."""
    return [share_in_place(row["answer"], text) for row, text in zip(rows, completions, strict=True)]


def share_in_place(answer: str, text: str) -> float:
    """1 for the right answer, 0 if no letter is in place."""
    right = sum(letter == wanted for letter, wanted in zip(text, answer, strict=False))
    return right / max(len(answer), len(text), 1)

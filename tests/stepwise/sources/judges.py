"""Judges for the tests' tiny runs, named in settings as tests.stepwise.sources.judges:good_words."""

from __future__ import annotations


def good_words(rows, completions):
    """How many words of a completion are good ones."""
    assert all("prompt" in row for row in rows)
    return [float(sum(word.startswith("good") for word in text.split())) for text in completions]


def too_few(rows, completions):
    """One score short."""
    return [0.0] * (len(completions) - 1)


def no_numbers(rows, completions):
    """Not a list."""
    return None


def alike(rows, completions):
    """Finds no difference."""
    return [1.0] * len(completions)


def ties_often(rows, completions):
    """Sees a difference for every other prompt only, and then always."""
    return [
        float(len(text)) if int(row["prompt"].split()[0].removeprefix("word")) % 2 else 0.0
        for row, text in zip(rows, completions, strict=True)
    ]


def fails(rows, completions):
    """A mistake of its author."""
    return [row["missing"] for row in rows]

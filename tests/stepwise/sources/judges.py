"""Judges for the tests' tiny runs; settings name them like tests.stepwise.sources.judges:good_words."""

from __future__ import annotations


def good_words(rows, completions):
    """The number of good words in a completion."""
    assert all("prompt" in row for row in rows)
    return [float(sum(word.startswith("good") for word in text.split())) for text in completions]


def too_few(rows, completions):
    """Returns one score too few."""
    return [0.0] * (len(completions) - 1)


def no_numbers(rows, completions):
    """Returns no list."""
    return None


def alike(rows, completions):
    """Scores everything alike."""
    return [1.0] * len(completions)


def ties_often(rows, completions):
    """Scores the answers to every other prompt alike, and all others by length."""
    return [
        float(len(text)) if int(row["prompt"].split()[0].removeprefix("word")) % 2 else 0.0
        for row, text in zip(rows, completions, strict=True)
    ]


def fails(rows, completions):
    """Fails by a mistake of its author."""
    return [row["missing"] for row in rows]


def not_a_number(rows, completions):
    """Has no score for completions with the word bad."""
    return [float("nan") if "bad" in text else 1.0 for text in completions]

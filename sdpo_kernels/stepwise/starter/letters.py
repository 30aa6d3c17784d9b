"""The demo's task: sort the letters of a word into alphabetical order. Answers can be checked exactly.

    source = SOURCES[0]                                        # words of four letters
    draw_words(source, "preference", 2, seed=0)                # two different words of that split
    problem = Problem("kdab"); problem.prompt, problem.answer, problem.careless     # "sort kdab:", "abdk", "adkb"

Words are split by a hash of their letters, so warm-up, preference pairs and evaluation have no word in common, whatever
the seeds.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import Literal

Split = Literal["warmup", "preference", "heldout"]
SPLITS: tuple[Split, ...] = ("warmup", "preference", "heldout")
SPLIT_ENDS = (128, 192, 256)  # of a byte's values: a half, a quarter and a quarter


@dataclass(frozen=True)
class Source:
    """Words of one length; `careless` is the careless author's share of the answers in the warm-up corpus."""

    name: str
    letters: int
    careless: float


SOURCES = (Source("short", 4, 0.50), Source("medium", 6, 0.55), Source("long", 8, 0.60))


@dataclass(frozen=True)
class Problem:
    """A word to sort."""

    word: str

    @property
    def prompt(self) -> str:
        """The model's input."""
        return f"sort {self.word}:"

    @cached_property
    def answer(self) -> str:
        """The one right answer."""
        return "".join(sorted(self.word))

    @cached_property
    def careless(self) -> str:
        """The careless author's answer: all letters but the last are sorted, and the last one stays in place."""
        return "".join(sorted(self.word[:-1])) + self.word[-1]

    def is_right(self, text: str) -> bool:
        """Whether `text` is exactly the answer."""
        return text == self.answer


def split_of(word: str) -> Split:
    """The split that `word` belongs to."""
    byte = hashlib.sha256(word.encode()).digest()[0]
    return next(split for split, end in zip(SPLITS, SPLIT_ENDS, strict=True) if byte < end)


def draw_words(source: Source, split: Split, count: int, seed: int, but: frozenset[str] = frozenset()) -> list[Problem]:
    """`count` different problems of `source` and `split`, none with a word in `but`; deterministic.

    ValueError: the split has too few words (there are 26 ** letters words in all splits together).
    """
    # words are drawn and rejected, which takes long if only few are left
    words = len(ascii_lowercase) ** source.letters
    if count + len(but) > words // 8:
        raise ValueError(f"count is {count}, must be at most {words // 8 - len(but)} for words of {source.letters}")

    # a string as seed is hashed by sha512: the same on all machines
    generator = random.Random(f"{source.name} {split} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        word = "".join(generator.choices(ascii_lowercase, k=source.letters))
        if word not in found and word not in but and split_of(word) == split:
            found[word] = Problem(word)

    return list(found.values())


def warmup_corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` (prompt, answer) rows of all sources in random order, by two authors who are not named.

    One sorts all letters. The other, who wrote a share of `source.careless` of each source, leaves the last in place.
    """
    rows = []
    for place, source in enumerate(SOURCES):
        # equal parts of `count`; the first sources take the remainder
        share = count // len(SOURCES) + (place < count % len(SOURCES))
        author = random.Random(f"author {source.name} {seed}")
        for problem in draw_words(source, "warmup", share, seed):
            rows.append((problem.prompt, problem.careless if author.random() < source.careless else problem.answer))

    random.Random(f"order {seed}").shuffle(rows)
    return rows

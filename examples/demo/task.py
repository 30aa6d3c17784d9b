"""The demo's task, whose answers can be checked: write the letters of a word in alphabetical order.

    source = SOURCES[0]                                        # words of four letters
    draw_words(source, "preference", 2, seed=0)                # two different words of that split
    problem = Problem("kdab"); problem.prompt, problem.answer, problem.careless     # "sort kdab:", "abdk", "adkb"

Words are divided by a hash of their letters, so what the model is warmed up on, what its preference pairs are about and
what it is tested on have no word in common, whatever the seeds.
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
SPLIT_ENDS = (128, 192, 256)  # a half, a quarter and a quarter of the values of a byte


@dataclass(frozen=True)
class Source:
    """Words of one length; the careless author wrote `careless` of the answers in the warm-up corpus."""

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
        """What the model is given."""
        return f"sort {self.word}:"

    @cached_property
    def answer(self) -> str:
        """The one right answer."""
        return "".join(sorted(self.word))

    @cached_property
    def careless(self) -> str:
        """What the careless author writes: all letters but the last are sorted, the last one stays where it was."""
        return "".join(sorted(self.word[:-1])) + self.word[-1]

    def is_right(self, text: str) -> bool:
        """Whether `text` is exactly the answer."""
        return text == self.answer


def split_of(word: str) -> Split:
    """The split that `word` belongs to."""
    byte = hashlib.sha256(word.encode()).digest()[0]
    return next(split for split, end in zip(SPLITS, SPLIT_ENDS, strict=True) if byte < end)


def draw_words(source: Source, split: Split, count: int, seed: int, but: frozenset[str] = frozenset()) -> list[Problem]:
    """`count` different problems of `source` and `split`, none with a word in `but`; the same for the same arguments.

    ValueError: the split has not so many words (26 ** letters words are shared out between the splits).
    """
    words = len(ascii_lowercase) ** source.letters
    if count + len(but) > words // 8:  # draws by trial, which takes long when few words are left
        raise ValueError(f"count is {count}, must be at most {words // 8 - len(but)} for words of {source.letters}")
    generator = random.Random(f"{source.name} {split} {seed}")  # a string seeds by its hash: the same on all machines
    found: dict[str, Problem] = {}
    while len(found) < count:
        word = "".join(generator.choices(ascii_lowercase, k=source.letters))
        if word not in found and word not in but and split_of(word) == split:
            found[word] = Problem(word)
    return list(found.values())


def warmup_corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` (prompt, answer) rows of all sources in random order, the work of two authors, unsigned.

    One sorts all the letters; the other, who wrote `source.careless` of a source, leaves the last letter where it was.
    """
    rows = []
    for place, source in enumerate(SOURCES):
        share = count // len(SOURCES) + (place < count % len(SOURCES))
        author = random.Random(f"author {source.name} {seed}")
        for problem in draw_words(source, "warmup", share, seed):
            rows.append((problem.prompt, problem.careless if author.random() < source.careless else problem.answer))
    random.Random(f"order {seed}").shuffle(rows)
    return rows

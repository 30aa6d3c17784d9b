"""The allowed values of the losses' options: one table, so that an option means the same for every loss."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

Option = float | str


class Between(NamedTuple):
    """A finite number in a range; `text` describes it in errors."""

    text: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is in the range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below


class OneOf(NamedTuple):
    """One of several names."""

    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """Its description in errors."""
        return f"one of: {', '.join(self.names)}"

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of the names."""
        return value in self.names


Allowed = Between | OneOf

NUMBER = Between("a finite number")
POSITIVE = Between("a finite number above 0", low=0, low_open=True)
NOT_NEGATIVE = Between("a finite number, at least 0", low=0)
ALLOWED: dict[str, Allowed] = {
    "label_smoothing": Between("at least 0 and below 0.5", low=0, high=0.5, high_open=True),
    "f_divergence": OneOf(("reverse_kl", "forward_kl", "js", "alpha")),
    "f_alpha": NOT_NEGATIVE,
    "dpop_lambda": NOT_NEGATIVE,
    "length_alpha": NOT_NEGATIVE,
    "discopop_tau": POSITIVE,
    "simpo_gamma": NOT_NEGATIVE,
    "cpo_alpha": NOT_NEGATIVE,
    "ld_alpha": Between("at least 0 and at most 1", low=0, high=1),
}


def require(name: str, value: Any, allowed: Allowed) -> None:
    """Raise ValueError with what `value` was and what it should be, unless it is allowed."""
    if not allowed.holds(value):
        raise ValueError(f"{name}: was {value!r}, must be {allowed.text}")


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: '; did you mean …?' if a known one is similar."""
    near = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""

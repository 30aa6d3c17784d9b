"""One row of progress: name, bar, done/total, time, note; `fitted` lays it out in a given number of columns.

row = Row("stage 1 of 3 easy", total=40)
row.update(12, "loss 0.6584  acc 0.78")
row.text(80)     # in a terminal; never wider than 80 columns
row.line()       # in a log file
"""

from __future__ import annotations

import math
import time
from collections import deque

from rich.text import Text

from sdpo_kernels.stepwise.common.units import write_seconds

GAP = "  "  # between the parts of a row, and between the parts of a note
WIDEST_BAR, NARROWEST_BAR = 20, 8  # columns
NAME = 28  # columns up to which a name is padded, in wide terminals
SHORTEST_NAME = 20  # columns; where the name would be shorter, the bar goes
WINDOW = 100  # updates from which the speed is computed
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
ASCII = str.maketrans({"━": "#", "─": "-", "…": "~", **dict.fromkeys(SPINNER, "*")})


class Row:
    """Progress of one piece of work over `total` units; None where nothing can be counted.

    `done` units were done before: the remaining time is computed from the others.
    """

    def __init__(self, name: str, total: int | None, done: int = 0) -> None:
        self.name, self.total, self.done, self.note = name, total, done, ""
        self.started = time.monotonic()
        self._updates = deque([(self.started, done)], maxlen=WINDOW)

    def update(self, done: int, note: str = "") -> None:
        """Enter that `done` units of the total are done; without a note the last one stays."""
        self.done, self.note = done, note or self.note
        self._updates.append((time.monotonic(), done))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float | None:
        """The remaining time at the speed of the last updates; None before the first one."""
        (first_time, first), (last_time, last) = self._updates[0], self._updates[-1]
        if self.total is None or last <= first:
            return None
        return (self.total - last) * (last_time - first_time) / (last - first)

    def time(self, ended: bool = False) -> str:
        """The remaining time; at the end, and as long as it is not known, the elapsed time."""
        if self.total is not None and self.done >= self.total:
            return f"took {write_seconds(self.elapsed)}"
        left = self.seconds_left
        if ended or left is None:
            return f"{write_whole_seconds(self.elapsed)} so far"
        return f"{write_whole_seconds(left)} left"

    def text(self, width: int, ended: bool = False) -> Text:
        """The row in a terminal of `width` columns."""
        if self.total is None:
            sign = SPINNER[int(self.elapsed * 10) % len(SPINNER)]
            elapsed = write_whole_seconds(self.elapsed)
            return _text(f"{sign} {shortened(self.name, width - 4 - len(elapsed))}{GAP}{elapsed}", width)
        share = self.done / self.total if self.total else 1.0
        return fitted(width, self.name, share, f"{self.done}/{self.total}", self.time(ended), self.note)

    def line(self, *further: str) -> str:
        """The row in a log file, with `further` parts before the note."""
        return GAP.join(filter(None, (self.name, f"{self.done}/{self.total}", self.time(), *further, self.note)))


def fitted(width: int, name: str, share: float, count: str, time: str, note: str) -> Text:
    """A row of at most `width` columns.

    What does not fit is left out in this order: parts of the note, from its end; half of the bar; the middle of the
    name; the bar.
    """
    # names are padded, so that the bars of rows with short names are below each other
    rest = width - len(count) - len(time) - 2 * len(GAP)
    room = rest - NARROWEST_BAR - len(GAP)
    if room < min(len(name), SHORTEST_NAME):
        return _text(GAP.join((shortened(name, rest), count, time)), width)
    name = shortened(name, room).ljust(min(NAME, width // 3, room))
    bar = min(WIDEST_BAR, rest - len(name) - len(GAP))

    left = rest - len(name) - len(GAP) - bar
    parts = []
    for part in filter(None, note.split(GAP)):
        left -= len(GAP) + len(part)
        if left < 0:
            break
        parts.append(part)

    filled = round(min(1.0, max(0.0, share)) * bar)
    text = Text(f"{name}{GAP}")
    text.append("━" * filled, style="bar.finished" if share >= 1 else "bar.complete")
    text.append("─" * (bar - filled), style="bar.back")
    text.append(GAP.join(("", count, time, *parts)))
    return _one_line(text, width)


def shortened(name: str, width: int) -> str:
    """`name` in `width` columns, without its middle: both "stage 2 of 3" and what is done, after the colon, stay."""
    if len(name) <= width:
        return name
    end = name[name.rindex(": ") :] if ": " in name else name[len(name) - width // 3 :] if "/" in name else ""
    if len(end) > width // 2:
        end = ""
    return f"{name[: max(0, width - len(end) - 1)]}…{end}"


def write_whole_seconds(seconds: float) -> str:
    """A duration without a fraction: 1s, 3m05s or 2h07m."""
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else write_seconds(whole)


def _text(text: str, width: int) -> Text:
    return _one_line(Text(text), width)


def _one_line(text: Text, width: int) -> Text:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text

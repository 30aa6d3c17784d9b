"""Progress over all stages of a run: steps done, steps planned, and about how long the rest takes.

overall = RunProgress([StagePlan(steps=40, tokens=512.0), StagePlan(steps=None)])
overall.begin(1)
overall.begin_training(1, done=0, steps=40)
overall.update(1, 12)
overall.count, overall.time, overall.note     # "step 12/40+", "over 3m05s left", "5m10s so far", …
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from sdpo_kernels.stepwise.common.progress_rows import GAP, fitted, write_whole_seconds


@dataclass
class StagePlan:
    """What is known of a stage."""

    steps: int | None  # None: its pairs are generated when it starts, so its steps are not known yet
    tokens: float = 1.0  # mean number of tokens of a step
    done: int = 0  # steps


class RunProgress:
    """Steps and time of a run. The rest is estimated from what this process did: earlier ones had other conditions.

    1. Training: seconds per trained token, times the tokens that are left.
    2. Everything else (loading, scoring, evaluating, saving): seconds per token of the stages begun, times the tokens
       of those that have not begun.
    """

    def __init__(self, stages: Sequence[StagePlan]) -> None:
        self.stages = list(stages)
        self.started = time.monotonic()
        self._first_stage: float | None = None  # when it began
        self._begun: set[int] = set()
        self._last = 0.0  # when the last step ended
        self._training, self._trained = 0.0, 0.0  # seconds, tokens

    def begin(self, index: int) -> None:
        """Stage `index` (from 1) begins."""
        if self._first_stage is None:
            self._first_stage = time.monotonic()
        self._begun.add(index)

    def begin_training(self, index: int, done: int, steps: int) -> None:
        """Its training begins after step `done`, which is not 0 if it resumes; it has `steps` steps."""
        self.begin(index)
        self.stages[index - 1].done, self.stages[index - 1].steps = done, steps
        self._last = time.monotonic()

    def update(self, index: int, done: int) -> None:
        """Stage `index` has done `done` steps."""
        stage, now = self.stages[index - 1], time.monotonic()
        self._training += now - self._last
        self._trained += (done - stage.done) * stage.tokens
        self._last, stage.done = now, done

    @property
    def unknown(self) -> list[int]:
        """The stages whose steps are not known yet."""
        return [index for index, stage in enumerate(self.stages, 1) if stage.steps is None]

    @property
    def done(self) -> int:
        """Steps done, of all stages."""
        return sum(stage.done for stage in self.stages)

    @property
    def total(self) -> int:
        """Steps of all stages whose steps are known."""
        return sum(stage.steps or 0 for stage in self.stages)

    @property
    def seconds_left(self) -> float | None:
        """About how long the stages with known steps still take; None before the first step of this process."""
        if self._trained == 0 or self._first_stage is None:
            return None
        left = sum(((stage.steps or 0) - stage.done) * stage.tokens for stage in self.stages)
        begun = sum(self._size(index) for index in self._begun)
        ahead = sum(self._size(i) for i, stage in enumerate(self.stages, 1) if i not in self._begun and not stage.done)
        other = max(0.0, self._last - self._first_stage - self._training)
        return left * self._training / self._trained + ahead * other / begun

    def _size(self, index: int) -> float:
        stage = self.stages[index - 1]
        return (stage.steps or 0) * stage.tokens

    @property
    def count(self) -> str:
        """Such as "step 12/40"; with a plus if some stages are not counted."""
        return f"step {self.done}/{self.total}{'+' if self.unknown else ''}"

    @property
    def time(self) -> str:
        """Such as "about 3m05s left"."""
        left = self.seconds_left
        if self.done == self.total and not self.unknown:
            return "all steps done"
        if left is None or self.done == self.total:  # the rest is of stages whose pairs are to be generated
            return "time left not known yet"
        return f"{'over' if self.unknown else 'about'} {write_whole_seconds(left)} left"

    @property
    def note(self) -> str:
        """How long this process has run, and which stages are not counted."""
        parts = [f"{write_whole_seconds(time.monotonic() - self.started)} so far"]
        if self.unknown:
            stages = ", ".join(map(str, self.unknown))
            parts.insert(0, f"+ stage {stages} (pairs to be generated)")
        return GAP.join(parts)

    def line(self) -> str:
        """The row in a log file."""
        return f"run {self.count}, {self.time}"

    def text(self, width: int) -> Text:
        """The row in a terminal of `width` columns."""
        share = self.done / self.total if self.total else 0.0
        return fitted(width, "run", share, self.count, self.time, self.note)

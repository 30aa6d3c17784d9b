"""Console output of a run: rows of progress in a terminal, plain lines elsewhere, only warnings with --quiet.

    with reporter.waiting("loading the model"):               # nothing can be counted
        ...
    with reporter.task("stage 1 of 3 easy", total) as task:
        task.update(done, "loss 0.6584")

Without torch, so that a command can say that it is loading torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sdpo_kernels.stepwise.common.progress_rows import ASCII, Row
from sdpo_kernels.stepwise.common.run_progress import RunProgress, StagePlan

LINE_SECONDS = 10.0  # least time between two plain lines of one task


class Task(Protocol):
    """Progress of one piece of work, shown as a bar or as a series of lines."""

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` units of the total are done."""


class Reporter:
    """Prints messages and progress to one console."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.overall: RunProgress | None = None  # of a run with several stages
        self._rows: list[Row] = []  # in a terminal: those shown at present
        self._live: Live | None = None

    def say(self, message: Any) -> None:
        """Print a message: plain text or a rich renderable."""
        if not self.quiet:
            self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """Print a warning; with --quiet it still goes to stderr."""
        if self.quiet:
            print(f"warning: {message}", file=sys.stderr)
        else:
            self.console.print(f"warning: {message}", style="yellow", markup=False)

    def plan(self, stages: Sequence[StagePlan]) -> None:
        """From now on show progress over all `stages`, too; over one alone there is nothing more to show."""
        self.overall = RunProgress(stages) if len(stages) > 1 else None

    def begin(self, stage: int) -> None:
        """Stage `stage` (from 1) of the plan begins."""
        if self.overall is not None:
            self.overall.begin(stage)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that `what` is going on, such as "loading the model": a row that goes away, or one line."""
        if self.quiet:
            yield
        elif self.console.is_terminal:
            with self._shown(Row(what, None)):
                yield
        else:
            self.say(what)
            yield

    @contextmanager
    def task(
        self, name: str, total: int, done: int = 0, *, stage: int | None = None, keep: bool = True
    ) -> Iterator[Task]:
        """Show progress over `total` units of work, of which an earlier process has done `done`.

        `stage`: they are the steps of this stage (from 1), and count in the progress of the run. `keep`: the row or
        line stays when the work is done.
        """
        overall = self.overall if stage is not None else None
        if overall is not None and stage is not None:
            overall.begin_training(stage, done, total)

        if self.quiet:
            yield _Silent()

        elif self.console.is_terminal:
            row = _Counted(name, total, done, overall, stage)
            try:
                with self._shown(row):
                    yield row
            finally:
                if keep:
                    self.console.print(self._plain(row.text(self.console.width, ended=True)))

        else:
            # a log file keeps every frame of a bar, so it gets a line now and then instead
            yield _Lines(self, _Counted(name, total, done, overall, stage), keep)

    @contextmanager
    def _shown(self, row: Row) -> Iterator[None]:
        """Draw `row` in the terminal, below rows that are shown already."""
        self._rows.append(row)
        if self._live is None:
            self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        try:
            yield
        finally:
            self._rows.remove(row)
            if not self._rows and self._live is not None:
                self._live.stop()
                self._live = None

    def _draw(self) -> Group:
        rows: list[Row | RunProgress] = [*self._rows]
        if self.overall is not None:
            rows.append(self.overall)
        return Group(*(self._plain(row.text(self.console.width)) for row in rows))

    def _plain(self, text: Text) -> Text:
        """`text`, in ASCII if the terminal has nothing else."""
        return Text(text.plain.translate(ASCII), no_wrap=True) if self.console.options.ascii_only else text


class Mute(Reporter):
    """Prints nothing, not even warnings: the reporter of every rank but 0."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, message: str) -> None:
        """Rank 0 prints the warning."""


class _Silent:
    def update(self, done: int, note: str = "") -> None:
        pass


class _Counted(Row):
    """A row that also counts in the progress of the run, if it is a stage's training."""

    def __init__(self, name: str, total: int, done: int, overall: RunProgress | None, stage: int | None) -> None:
        super().__init__(name, total, done)
        self.overall, self.stage = overall, stage

    def update(self, done: int, note: str = "") -> None:
        super().update(done, note)
        if self.overall is not None and self.stage is not None:
            self.overall.update(self.stage, done)


class _Lines:
    """A line every LINE_SECONDS and, with `keep`, one at the end."""

    def __init__(self, reporter: Reporter, row: _Counted, keep: bool) -> None:
        self.reporter, self.row, self.keep = reporter, row, keep
        self.last_time = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        self.row.update(done, note)
        now = time.monotonic()
        ended = self.row.total is not None and done >= self.row.total
        if (ended and self.keep) or now - self.last_time >= LINE_SECONDS:
            self.last_time = now
            overall = self.row.overall
            self.reporter.say(self.row.line(*(() if overall is None else (overall.line(),))))

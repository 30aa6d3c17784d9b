"""Console output of a run: progress bars in a terminal, plain lines elsewhere, only warnings with --quiet."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Show progress over `total` units of work."""
        if self.quiet:
            yield _Silent()

        elif self.console.is_terminal:
            # names contain user input, so a "[" in them must not be read as markup
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Progress(*columns, console=self.console) as bars:
                yield _Bar(bars, bars.add_task(name, total=total, note=""))

        else:
            # a log file keeps every frame of a bar, so it gets a line now and then instead
            yield _Lines(self, name, total)


class Mute(Reporter):
    """Prints nothing, not even warnings: the reporter of every rank but 0."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, message: str) -> None:
        """Rank 0 prints the warning."""


class _Silent:
    def update(self, done: int, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self.bars, self.task, self.note = bars, task, ""

    def update(self, done: int, note: str = "") -> None:
        self.note = note or self.note
        self.bars.update(self.task, completed=done, note=self.note)


class _Lines:
    """A line every LINE_SECONDS and one at the end."""

    def __init__(self, reporter: Reporter, name: str, total: int) -> None:
        self.reporter, self.name, self.total = reporter, name, total
        self.last_time, self.last_note = time.monotonic(), ""

    def update(self, done: int, note: str = "") -> None:
        self.last_note = note or self.last_note
        now = time.monotonic()
        if done >= self.total or now - self.last_time >= LINE_SECONDS:
            self.last_time = now
            self.reporter.say(f"{self.name}  {done}/{self.total}  {self.last_note}".rstrip())


def peak_memory_bytes() -> int:
    """Peak memory: allocated on the GPU since the last reset or, without CUDA, resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def reset_peak_memory() -> None:
    """Reset the peak of the GPU; the peak of resident memory cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

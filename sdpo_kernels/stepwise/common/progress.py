"""What a person sees while a run works: a progress bar in a terminal, plain lines elsewhere, nothing with --quiet."""

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

LINE_SECONDS = 10.0  # between plain lines of one task


class Task(Protocol):
    """One bar or one series of lines."""

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are done."""


class Reporter:
    """Messages and progress on one console."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())

    def say(self, message: Any) -> None:
        """A line (plain text) or a rich renderable."""
        if not self.quiet:
            self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """A warning; shown on stderr with --quiet too."""
        if self.quiet:
            print(f"warning: {message}", file=sys.stderr)
        else:
            self.console.print(f"warning: {message}", style="yellow", markup=False)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Progress over `total` units of work."""
        if self.quiet:
            yield _Silent()
        elif self.console.is_terminal:
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
            yield _Lines(self, name, total)


class Mute(Reporter):
    """Says nothing at all: what the processes of a run other than its first have."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, message: str) -> None:
        """Left to the first process."""


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
    """A line every few seconds and at the end."""

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
    """Peak of the CUDA allocator since its last reset, or of this process's resident memory where there is no CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start a new peak, where the device can (the peak of resident memory only ever grows)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

"""Console output: bars in a terminal, plain lines elsewhere, only warnings with --quiet."""

import io

import torch
from rich.console import Console

from sdpo_kernels.stepwise.common import progress
from sdpo_kernels.stepwise.common.progress import Reporter, peak_memory_bytes


def reporter(quiet=False, terminal=False):
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, highlight=False, soft_wrap=True, width=100, color_system=None
    )
    return Reporter(quiet, console), stream


def test_plain_lines_without_a_terminal():
    shown, stream = reporter()
    with shown.task("stage 1 easy", 3) as task:
        task.update(1, "loss 0.7")
        task.update(3)
    shown.say("[bold]not markup[/bold]")
    shown.warn("careful")
    assert stream.getvalue() == "stage 1 easy  3/3  loss 0.7\n[bold]not markup[/bold]\nwarning: careful\n"
    assert "\x1b" not in stream.getvalue()


def test_a_line_every_few_seconds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown, stream = reporter()
    with shown.task("x", 100) as task:
        for step in range(1, 26):
            clock[0] = float(step)
            task.update(step)
    assert stream.getvalue().split() == ["x", "10/100", "x", "20/100"]


def test_quiet_shows_only_warnings_on_stderr(capsys):
    shown, stream = reporter(quiet=True)
    with shown.task("x", 2) as task:
        task.update(2, "note")
    shown.say("hello")
    shown.warn("careful")
    assert stream.getvalue() == ""
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: careful\n")


def test_a_bar_in_a_terminal():
    shown, stream = reporter(terminal=True)
    with shown.task("stage 1 [easy]", 4) as task:
        task.update(2, "loss 0.69")
        task.update(4)
    text = stream.getvalue()
    assert "stage 1 [easy]" in text
    assert "4/4" in text
    assert "loss 0.69" in text


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes()
    block = torch.ones(16_000_000)  # 64 MB, touched
    assert 1e7 < before <= peak_memory_bytes() < 1e12
    assert float(block[-1]) == 1

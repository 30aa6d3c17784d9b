"""Console output: rows in a terminal, plain lines elsewhere, only warnings with --quiet."""

import io
from contextlib import suppress

import pytest
from rich.console import Console

from sdpo_kernels.stepwise.common.progress import Mute, Reporter
from sdpo_kernels.stepwise.common.run_progress import StagePlan

WIDTHS = [70, 80, 100, 120]
NOTE = "loss 0.6584  margin +0.075  acc 0.78  12,350 tok/s  peak 730 MiB"
PARTS = NOTE.split("  ")
LONG = "commonsense-with-a-rather-long-name-for-a-stage"


@pytest.fixture
def clock(monkeypatch):
    """The seconds that pass, set by the test."""
    seconds = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    return seconds


def reporter(quiet=False, terminal=False, width=100, file=None):
    stream = file or io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, highlight=False, soft_wrap=not terminal, width=width, color_system=None
    )
    return Reporter(quiet, console), stream


def drawn(shown):
    """The rows that the terminal has now."""
    console = Console(file=io.StringIO(), width=shown.console.width, color_system=None)
    console.print(shown._draw())
    return console.file.getvalue().splitlines()


def bar_of(row):
    """The columns of the bar: done, not done."""
    return row.count("━"), row.count("─")


# ---- a terminal ----


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_name_bar_count_and_time(clock, width):
    shown, _ = reporter(terminal=True, width=width)
    with shown.task("stage 2 of 3 hard", 900) as task:
        clock[0] = 340.0
        task.update(340, NOTE)
        (row,) = drawn(shown)
        assert len(row) <= width
        assert row.startswith("stage 2 of 3 hard ")
        filled, rest = bar_of(row)
        assert filled + rest == 20
        assert filled == round(20 * 340 / 900)
        assert "  340/900  9m20s left" in row  # 560 s at a step a second

        # parts of the note are there whole or not at all, from its start
        note = row.split("left")[1].split("  ")[1:]
        assert note == PARTS[: len(note)]
        assert len(row) + 2 + len(PARTS[len(note)]) > width or note == PARTS


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("what", ["", ": references"])
def test_a_long_name_keeps_its_stage_and_what_is_done(clock, width, what):
    shown, _ = reporter(terminal=True, width=width)
    with shown.task(f"stage 2 of 3 {LONG}{what}", 120_000) as task:
        clock[0] = 1000.0
        task.update(1000, NOTE)
        (row,) = drawn(shown)
        assert len(row) <= width
        assert sum(bar_of(row)) >= 8
        assert "  1000/120000  33h03m left" in row  # 119,000 s
        name = row.split("  ")[0].rstrip("━─ ")
        assert name.startswith("stage 2 of 3 comm")
        assert name.endswith(what)
        assert (LONG in name) != ("…" in name)


@pytest.mark.parametrize("width", [5, 20, 30, 40, 50])
def test_a_narrow_terminal_never_breaks_a_row(clock, width):
    shown, _ = reporter(terminal=True, width=width)
    shown.plan([StagePlan(900), StagePlan(None)])
    with shown.task(f"stage 1 of 2 {LONG}", 900, stage=1) as task, shown.waiting("loading the model runs/x/y"):
        clock[0] = 340.0
        task.update(340, NOTE)
        rows = drawn(shown)
        assert len(rows) == 3  # the stage, the wait, the run
        assert all(len(row) <= width for row in rows)
        assert width < 40 or "340/900  9m20s left" in rows[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_run_has_a_row_of_its_own(clock, width):
    shown, _ = reporter(terminal=True, width=width)
    shown.plan([StagePlan(300, done=300), StagePlan(500), StagePlan(100)])
    shown.begin(2)
    with shown.task("stage 2 of 3 hard", 500, stage=2) as task:
        assert "step 300/900  time left not known yet" in drawn(shown)[1]
        clock[0] = 40.0
        task.update(40, NOTE)
        row = drawn(shown)[1]
        assert len(row) <= width
        assert row.startswith("run ")
        assert sum(bar_of(row)) >= 8
        assert "  step 340/900  about 9m20s left" in row
        assert row.endswith("  40s so far") == (width >= 100)


def test_stages_without_pairs_are_said_to_be_missing_from_the_total(clock):
    shown, _ = reporter(terminal=True, width=120)
    shown.plan([StagePlan(100), StagePlan(None), StagePlan(None)])
    shown.begin(1)
    with shown.task("stage 1 of 3 easy", 100, stage=1) as task:
        clock[0] = 40.0
        task.update(40)
        assert "step 40/100+  over 1m00s left  + stage 2, 3 (pairs to be generated)" in drawn(shown)[1]
        clock[0] = 100.0
        task.update(100)
        assert "step 100/100+  time left not known yet" in drawn(shown)[1]


def test_the_rest_of_a_run_counts_tokens_and_what_is_not_training(clock):
    shown, stream = reporter()
    shown.plan([StagePlan(10, tokens=100.0), StagePlan(10, tokens=300.0)])
    clock[0] = 5.0  # the evaluation before the first stage happens once
    shown.begin(1)
    clock[0] = 25.0  # 20 s of scoring for a stage of 1000 tokens
    with shown.task("stage 1 of 2 easy", 10, stage=1) as task:
        clock[0] = 35.0
        task.update(10)  # 10 s of training
    assert shown.overall.seconds_left == 3 * (10 + 20)
    assert stream.getvalue() == "stage 1 of 2 easy  10/10  took 10.0s  run step 10/20, about 1m30s left\n"


def test_a_single_stage_has_no_second_row():
    shown, _ = reporter(terminal=True)
    shown.plan([StagePlan(10)])
    with shown.task("stage 1 of 1 all", 10, stage=1):
        assert len(drawn(shown)) == 1


def test_a_resumed_stage_computes_its_time_from_its_own_steps(clock):
    shown, _ = reporter(terminal=True)
    shown.plan([StagePlan(900), StagePlan(100)])
    shown.begin(1)
    with shown.task("stage 1 of 2 easy", 900, 800, stage=1) as task:
        assert "800/900  0s so far" in drawn(shown)[0]
        clock[0] = 20.0
        task.update(810)
        rows = drawn(shown)
        assert "810/900  3m00s left" in rows[0]  # 90 steps at 2 s
        assert "step 810/1000  about 6m20s left" in rows[1]  # 190 steps at 2 s


def test_a_finished_row_says_how_long_it_took(clock):
    shown, stream = reporter(terminal=True)
    with shown.task("stage 1 [easy]", 4) as task:
        clock[0] = 65.0
        task.update(2, "loss 0.69")
        task.update(4)
    last = stream.getvalue().splitlines()[-1]
    assert "stage 1 [easy] " in last
    assert "━" * 20 + "  4/4  took 1m05s  loss 0.69" in last


def test_a_stopped_row_stays_without_a_remaining_time(clock):
    shown, stream = reporter(terminal=True)
    with suppress(KeyboardInterrupt), shown.task("stage 1", 4) as task:
        clock[0] = 5.0
        task.update(2)
        raise KeyboardInterrupt
    assert "2/4  5s so far" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize("width", WIDTHS)
def test_waiting_says_what_for_and_how_long(clock, width):
    shown, _ = reporter(terminal=True, width=width)
    path = "/a/long/path/" + "x" * 100 + "/runs/x/.stage-2-hard/finished"
    with shown.waiting("loading torch"), shown.waiting(f"loading the model {path}"):
        clock[0] = 12.0
        first, second = drawn(shown)
        assert first[2:] == "loading torch  12s"
        assert second[2:].startswith("loading the model /a")
        assert second.endswith("/finished  12s")
        assert len(second) <= width
    assert shown._rows == []
    assert shown._live is None


def test_work_that_is_not_kept_leaves_no_row():
    shown, stream = reporter(terminal=True)
    with shown.task("tokenizing", 4, keep=False) as task:
        task.update(4)
    after = stream.getvalue().rpartition("\x1b[2K")[2]  # the last line is erased
    assert after == "" or "tokenizing" not in after


def test_a_terminal_without_unicode_gets_ascii():
    shown, _ = reporter(terminal=True, file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with shown.waiting("loading"), shown.task(f"stage 1 of 3 {LONG * 3}", 4) as task:
        task.update(2)
        rows = drawn(shown)
        assert rows[0].startswith("* loading")
        assert "#" in rows[1]
        assert "-" in rows[1]
        assert "~" in rows[1]
        assert all(row.isascii() for row in rows)


# ---- a log file ----


def test_plain_lines_without_a_terminal(clock):
    shown, stream = reporter()
    with shown.waiting("loading the model"), shown.task("stage 1 easy", 3) as task:
        task.update(1, "loss 0.7")
        clock[0] = 4.2
        task.update(3)
    with shown.task("tokenizing", 3, keep=False) as task:
        task.update(3)
    shown.say("[bold]not markup[/bold]")
    shown.warn("careful")
    assert stream.getvalue().splitlines() == [
        "loading the model",
        "stage 1 easy  3/3  took 4.2s  loss 0.7",
        "[bold]not markup[/bold]",
        "warning: careful",
    ]


def test_a_line_every_few_seconds(clock):
    shown, stream = reporter()
    with shown.task("x", 100, keep=False) as task:
        for step in range(1, 26):
            clock[0] = float(step)
            task.update(step)
    assert stream.getvalue().splitlines() == ["x  10/100  1m30s left", "x  20/100  1m20s left"]


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_only_warnings_on_stderr(capsys, terminal):
    shown, stream = reporter(quiet=True, terminal=terminal)
    shown.plan([StagePlan(2), StagePlan(2)])
    with shown.waiting("loading"), shown.task("x", 2, stage=1) as task:
        task.update(2, "note")
    shown.say("hello")
    shown.warn("careful")
    assert stream.getvalue() == ""
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: careful\n")


def test_other_ranks_print_nothing(capsys):
    other = Mute()
    with other.waiting("loading"), other.task("x", 2) as task:
        task.update(2)
    other.warn("careful")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")

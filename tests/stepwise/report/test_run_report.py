"""The report: pictures, page and table of hand-written run folders; and the comparison of several models."""

import io
import json
import math
import os
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.report import drawing, pictures
from sdpo_kernels.stepwise.report.comparison import comparison_html, comparison_picture, wilson_interval
from sdpo_kernels.stepwise.report.run_report import read_run, stage_table, write_report

CURVES = ["loss.png", "reward_margin.png", "reward_accuracy.png"]
BY_STAGE = ["gamma_reference.png", "time.png", "memory.png"]
BY_MODEL = ["eval_accuracy.png", "eval_gamma.png"]


def scores(place: int) -> dict[str, Any]:
    return {
        "pairs": 50,
        "pair_accuracy": 0.6124 + 0.05 * min(place, 7),
        "pair_accuracy_per_token": 0.55,
        "gamma": -12.3 + place,
        "reward_accuracy": 0.7,
        "reward_margin": 0.25 * place if place else None,
    }


def stage(index: int, name: str, **changes: Any) -> dict[str, Any]:
    """A finished stage's entry in the manifest."""
    done = {"name": name, "index": index, "state": "done", "pairs": 1234, "dropped": 0, "loss": "sigmoid", "steps": 8}
    done |= {"first_loss": 0.693147, "last_loss": 0.4321, "seconds": 75.0, "peak_memory_bytes": 790 * 2**20}
    return done | {"gamma_reference": -38.6 + 20 * index, "eval": scores(index)} | changes


def pending(index: int, name: str, state: str = "pending") -> dict[str, Any]:
    """The entry of a stage that is not done."""
    empty = dict.fromkeys(["first_loss", "last_loss", "seconds", "peak_memory_bytes", "gamma_reference", "eval"])
    return stage(index, name, state=state, **empty)


def line(index: int, step: int, **values: Any) -> dict[str, Any]:
    """One logged step of a run whose stages have eight steps each."""
    place = {"stage/index": index, "step": step, "stage/global_step": 8 * (index - 1) + step}
    margin = 0.1 * (step - 1)
    logged = {"loss": math.log1p(math.exp(-margin)), "rewards/margins": margin, "rewards/accuracies": step / 10}
    return place | (values or logged)


def write_run(
    folder: Path, stages: list[dict[str, Any]], lines: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """Write a run folder as the driver leaves it; returns its manifest."""
    folder.mkdir(exist_ok=True)
    manifest = {"version": "0", "model": "models/tiny", "created": "2026-01-02", "environment": {"seed": 7}}
    manifest |= {"initial_eval": scores(0), "stages": stages} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (folder / "config.yaml").write_text("model: models/tiny # a < b & c\n")
    return manifest


def all_lines(stages: int) -> list[dict[str, Any]]:
    return [line(index, step) for index in range(1, stages + 1) for step in range(1, 9)]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG; fails on anything else."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


class Page(HTMLParser):
    """Collects the parts of a page that the tests check: tags, addresses and the table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def printed(manifest: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(stage_table(manifest))
    return stream.getvalue()


def test_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, [stage(1, "easy"), stage(2, "hard", dropped=3)], all_lines(2))
    before = set(os.listdir(run))
    written = write_report(run)
    assert [path.name for path in written] == [
        *CURVES,
        "gamma_reference.png",
        *BY_MODEL,
        "time.png",
        "memory.png",
        "report.html",
    ]
    assert set(os.listdir(run)) - before == {path.name for path in written}, "nothing temporary stays"
    assert {png_size(path) for path in written if path.suffix == ".png"} == {(1240, 700)}
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags.count("img") == 8
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    row = ["1 easy", "1,234", "0", "8", "0.6931", "0.4321", "0.662", "0.250", "−18.6", "1m15s", "790 MiB"]
    start = ["M₀ (start)", "–", "–", "–", "–", "–", "0.612", "–", "–", "–", "–"]
    assert page.cells[:22] == start + row
    assert page.cells[22] == "2 hard"
    assert "2 of 2 stages done" in text
    assert "models/tiny # a &lt; b &amp; c" in text
    assert "Left out" not in text


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    losses = [line(index, step, loss=1 / step) for index in (1, 2) for step in range(1, 9)]
    write_run(tmp_path, [stage(1, "easy", eval=None), pending(2, "hard")], losses[:8], initial_eval=None)
    first = write_report(tmp_path)
    write_run(tmp_path, [stage(1, "easy", eval=None), stage(2, "hard", eval=None)], losses, initial_eval=None)
    old = {path: path.read_bytes() for path in first}
    assert write_report(tmp_path) == first
    assert all(path.read_bytes() != old[path] for path in first)


def test_unfinished_run(tmp_path: Path) -> None:
    stages = [stage(1, "easy"), pending(2, "hard", "training"), pending(3, "last")]
    manifest = write_run(tmp_path, stages, [*all_lines(1), line(2, 1)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage/index": 2, "step": 2, "stage/glo')  # killed while writing
    assert len(write_report(tmp_path)) == 9
    text = (tmp_path / "report.html").read_text()
    assert "1 of 3 stages done" in text
    assert "not readable as logged steps: line 10." in text
    assert "2 hard (training)" in Page(text).cells
    assert "3 last (pending)" in Page(text).cells
    assert "(pending)" in printed(manifest)


def test_run_without_a_step(tmp_path: Path) -> None:
    write_run(tmp_path, [pending(1, "easy"), pending(2, "hard")], [], initial_eval=None)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").unlink()
    assert [path.name for path in write_report(tmp_path)] == ["report.html"]
    text = (tmp_path / "report.html").read_text()
    assert "nothing to draw" in text
    assert "config.yaml" not in text


def test_without_eval_one_stage(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, [stage(1, "all", eval=None)], all_lines(1), initial_eval=None)
    assert sorted(path.name for path in write_report(tmp_path)) == sorted([*CURVES, *BY_STAGE, "report.html"])
    assert "eval" not in printed(manifest)
    assert "eval accuracy" not in (tmp_path / "report.html").read_text()


@pytest.mark.filterwarnings("error")
def test_many_stages_with_long_names(tmp_path: Path) -> None:
    names = [f"a-source-with-a-long-name-{place}" for place in range(1, 31)]
    write_run(tmp_path, [stage(place, name) for place, name in enumerate(names, 1)], all_lines(30))
    written = write_report(tmp_path)
    assert len(written) == 9
    assert {png_size(path) for path in written[:-1]} == {(1240, 700)}
    assert all(name in (tmp_path / "report.html").read_text() for name in names)


@pytest.mark.filterwarnings("error:.*[Gg]lyph.*")
def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$\\frac$ {x}", "[red]b[/red]", "\"&'", "中文", ""]
    stages = [stage(place, name) for place, name in enumerate(names, 1)]
    manifest = write_run(tmp_path, stages, all_lines(len(names)), model="<script>m</script>")
    assert len(write_report(tmp_path)) == 9
    page = Page((tmp_path / "report.html").read_text())
    terminal = printed(manifest, 160)
    assert "script" not in page.tags
    for place, name in enumerate(names, 1):
        assert f"{place} {name}" in page.cells
        assert f"{place} {name}".strip() in terminal


def test_metrics_are_sorted_and_later_lines_win(tmp_path: Path) -> None:
    lines = [line(1, 2, loss=9.0), line(1, 1, loss=1.0), line(1, 2, loss=2.0), line(1, 2, eval_loss=5.0), line(7, 1)]
    lines.append(line(1, 2, train_runtime=3.0))
    write_run(tmp_path, [stage(1, "easy")], lines)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('\n[1]\n{"stage/index": 1}\n{"stage/index": [1]}\n')
    run = read_run(tmp_path)
    assert [entry.get("loss", entry.get("eval_loss")) for entry in run.lines] == [1.0, 2.0, 5.0]
    assert run.unreadable == [5, 8, 9, 10], "the line of a stage that the manifest lacks, and three broken ones"


def test_values_that_are_not_finite_do_not_hide_the_rest(tmp_path: Path) -> None:
    broken = stage(1, "easy", last_loss=math.nan, gamma_reference=math.inf, seconds=0.0)
    lines = [line(1, 1, loss=math.nan), line(1, 2, loss=math.inf), line(1, 3, loss=0.5), line(1, 4, loss="0.5")]
    write_run(tmp_path, [broken], lines)
    names = [path.name for path in write_report(tmp_path)]
    assert "loss.png" in names
    assert "gamma_reference.png" not in names
    assert {"nan", "inf"} <= set(Page((tmp_path / "report.html").read_text()).cells)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json"),
        ("{", "cannot be read as JSON"),
        ("\xff\xfe", "must be|cannot be read"),
        ("[]", 'a list "stages"'),
        ('{"stages": {}}', 'a list "stages"'),
        ('{"stages": [3]}', r"stages\[0\] is 3, must be an object"),
        ('{"stages": [{"index": 1}]}', r'stages\[0\] must have a "name"'),
        ('{"stages": [{"name": "a", "index": 2}]}', '"index": 1'),
        ('{"stages": [{"name": "a", "index": 1, "steps": "8"}]}', r"steps is '8', must be a number"),
        ('{"stages": [{"name": "a", "index": 1, "eval": 3}]}', "eval is 3, must be an object or null"),
        ('{"stages": [{"name": "a", "index": 1, "eval": {"gamma": true}}]}', "eval.gamma is True"),
        ('{"stages": [], "initial_eval": {"gamma": []}}', r"initial_eval.gamma is \[\]"),
    ],
)
def test_broken_manifest(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert set(os.listdir(tmp_path)) <= {"manifest.json"}


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, [pending(1, "easy")], [line(1, 1, loss=0.5)], initial_eval=None)
    (tmp_path / "loss.png").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*loss.png: No space left on device"):
        write_report(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == before


def test_terminal_table_fits_80_columns() -> None:
    text = printed({"stages": [stage(1, "easy"), stage(2, "hard", dropped=12)], "initial_eval": scores(0)})
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    row = next(row for row in text.splitlines() if row.startswith("1 easy"))
    values = ["1 easy", "1,234", "0", "8", "0.6931", "0.4321", "0.662", "0.250", "−18.6", "1m15s", "790 MiB"]
    assert re.split(r"\s+", row.strip()) == " ".join(values).split()


def test_cut_pairs_and_lost_tokens_are_in_both_tables(tmp_path: Path) -> None:
    stages = [stage(1, "easy", cut_pairs=0, lost_tokens=0), stage(2, "hard", cut_pairs=1347, lost_tokens=113482)]
    write_run(tmp_path, stages, all_lines(2))
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    at = page.cells.index("2 hard")
    assert page.cells[at : at + 4] == ["2 hard", "1,234", "1,347", "113,482"]

    text = printed({"stages": stages, "initial_eval": scores(0)})
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"2 hard +1,234 +1,347 +113,482", text)
    assert "cut" not in printed({"stages": stages[:1], "initial_eval": scores(0)})


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    write_run(tmp_path, [pending(1, "easy")], [line(1, 1, loss=0.5)], initial_eval=None)
    with matplotlib.rc_context({"font.size": 31.0}):
        before = dict(matplotlib.rcParams)
        write_report(tmp_path)
        large = (tmp_path / "loss.png").read_bytes()
        assert dict(matplotlib.rcParams) == before
    write_report(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == large, "the user's own settings do not change the pictures"


def test_loss_picture_shows_what_was_logged() -> None:
    stages = [stage(1, "easy"), stage(2, "hard", loss="ipo")]
    with drawing.picture_style():
        figure = pictures.loss_picture(stages, [*all_lines(2), line(2, 8, eval_loss=0.3)])
        assert figure is not None
        ax = figure.axes[0]
    curves = {len(drawn.get_xdata()): drawn for drawn in ax.get_lines()}
    drawn = [curve.get_xydata().tolist() for curve in ax.get_lines()]
    assert [[8 + step, line(2, step)["loss"]] for step in range(1, 9)] in drawn
    assert [[16.0, 0.3]] in drawn
    assert set(curves) == {8, 1, 2}, "two stages, one evaluation, the rule between the stages"
    (level,) = [segment.tolist() for lines in ax.collections for segment in lines.get_segments()]
    assert level == [[0, math.log(2)], [8, math.log(2)]], "ipo does not start at ln 2"
    assert {"1 easy", "2 hard", "ln 2"} <= {text.get_text() for text in ax.texts}


def test_moving_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0, 10.0])
    assert pictures.moving_mean(values, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 19 / 3, 6.5])
    assert pictures.moving_mean(values, 1).tolist() == values.tolist()
    assert pictures.smoothing_window(39) == 1
    assert pictures.smoothing_window(200) == 21


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (-38.61, "−38.6"), (1646.2, "1,646"), (0.0123, "0.0123"), (3e-9, "3.00e−09"), (1.5, "1.50")],
)
def test_number(value: float, text: str) -> None:
    assert drawing.number(value) == text


COMPARED = [
    {"name": "SFT", "pair_accuracy": 0.612, "exactly_right": 0.2, "pairs": 500, "prompts": 200},
    {"name": "DPO", "pair_accuracy": 0.867, "exactly_right": 0.4, "gamma_reference": {"all": -3.0}, "seconds": 12.5},
    {"name": "sDPO <b>", "pair_accuracy": 0.882, "exactly_right": 0.4, "gamma_reference": {"a": -4.0, "b": 1.0}},
]


def test_comparison(tmp_path: Path) -> None:
    picture = comparison_picture(tmp_path / "c.png", COMPARED, "Three")
    assert png_size(picture) == (1860, 700)
    page_path = comparison_html(tmp_path / "c.html", COMPARED, "Three <i>", picture, note="a & b")
    text = page_path.read_text()
    page = Page(text)
    assert sorted(os.listdir(tmp_path)) == ["c.html", "c.png"]
    assert "i" not in page.tags
    assert "b" not in page.tags
    assert "a &amp; b" in text
    assert page.cells[-9:] == ["sDPO <b>", "88.2%", "40.0%", "–", "–", "–", "–", "−4.00", "1.00"]
    assert page.addresses[0].startswith("data:image/png;base64,")


def test_comparison_by_group_and_panels(tmp_path: Path) -> None:
    rows = [
        {"name": name, "exactly_right": {"easy": 0.9, "hard": 0.1}, "prompts": {"easy": 9, "hard": 9}} for name in "ab"
    ]
    assert png_size(comparison_picture(tmp_path / "c.png", rows, "t")) == (620, 700), "one panel has data"
    page = Page(comparison_html(tmp_path / "c.html", rows, "t", tmp_path / "c.png").read_text())
    assert page.cells == ["a", "90.0%", "10.0%", "9", "9", "b", "90.0%", "10.0%", "9", "9"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ([{"pair_accuracy": 0.5}], '"name"'),
        ([{"name": "a", "pair_accuracy": 50.0}], "pair_accuracy of a is 50.0"),
        ([{"name": "a", "exactly_right": {"x": math.nan}}], "exactly_right of a is nan"),
        ([{"name": "a"}], "none has pair_accuracy"),
    ],
)
def test_comparison_refuses(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison_picture(tmp_path / "c.png", rows, "t")
    assert os.listdir(tmp_path) == []


def test_wilson_interval() -> None:
    """Against the interval's definition: at its ends p, |share − p| is z standard errors of p."""
    for share, count in [(0.0, 10), (0.37, 100), (1.0, 50)]:
        for end in wilson_interval(share, count):
            distance = abs(share - end) / math.sqrt(end * (1 - end) / count) if 1e-9 < end < 1 - 1e-9 else 1.959964
            assert distance == pytest.approx(1.959964, rel=1e-6)
            assert 0 <= end <= 1

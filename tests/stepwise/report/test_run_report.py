"""The report: pictures, page and table of hand-written run folders."""

import math
import os
import re
from pathlib import Path

import matplotlib
import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.report import drawing
from sdpo_kernels.stepwise.report.run_report import read_run, write_report
from tests.stepwise.report.folders import (
    Page,
    all_lines,
    line,
    pending,
    png_size,
    printed,
    scores,
    stage,
    write_run,
)

CURVES = ["loss.png", "reward_margin.png", "reward_accuracy.png"]
BY_MODEL = ["eval_accuracy.png", "eval_gamma.png"]
BY_STAGE = ["gamma_reference.png", "time.png", "memory.png"]
SMALL = (780, 540)  # pixels, at twice the density of a screen


def test_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, [stage(1, "easy"), stage(2, "hard", dropped=3)], all_lines(2))
    before = set(os.listdir(run))
    written = write_report(run)
    assert [path.name for path in written] == [*CURVES, *BY_MODEL, *BY_STAGE, "report.html"]
    assert set(os.listdir(run)) - before == {path.name for path in written}, "nothing temporary stays"
    assert {png_size(path) for path in written if path.suffix == ".png"} == {SMALL}
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 8
    assert all(address.startswith("#") for address in page.addresses), "nothing is loaded"
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    row = ["1 easy", "1,234", "0", "8", "0.6931", "0.4321", "0.662", "0.700", "0.250", "−18.6", "1m15s", "790 MiB"]
    start = ["M₀ (start)", "–", "–", "–", "–", "–", "0.612", "–", "–", "–", "–", "–"]
    assert page.cells[:24] == start + row
    assert page.cells[24] == "2 hard"
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
    assert {png_size(path) for path in written[:-1]} == {SMALL}
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


def test_the_pairs_that_are_used_are_in_both_tables(tmp_path: Path) -> None:
    """Of earlier versions' stages they are not known."""
    stages = [stage(1, "easy", pairs_used=320), stage(2, "hard", pairs_used=1234), stage(3, "old")]
    write_run(tmp_path, stages, all_lines(3))
    write_report(tmp_path)
    cells = Page((tmp_path / "report.html").read_text()).cells
    for name, used in (("1 easy", "320"), ("2 hard", "1,234"), ("3 old", "–")):
        assert cells[cells.index(name) :][:3] == [name, "1,234", used]
    assert re.search(r"1 easy +1,234 +320 ", printed({"stages": stages}))
    assert "used" not in printed({"stages": [stage(1, "hard", pairs_used=1234), stage(2, "old")]})


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


def test_skipped_rows_are_on_the_page_if_there_are_any(tmp_path: Path) -> None:
    write_run(tmp_path, [stage(1, "easy", skipped=0), stage(2, "hard", skipped=1021, dropped=12)], all_lines(2))
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    at = page.cells.index("2 hard")
    assert page.cells[at : at + 4] == ["2 hard", "1,234", "1,021", "12"]
    write_run(tmp_path, [stage(1, "easy", skipped=0)], all_lines(1))
    write_report(tmp_path)
    assert "skipped rows" not in (tmp_path / "report.html").read_text()


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    write_run(tmp_path, [pending(1, "easy")], [line(1, 1, loss=0.5)], initial_eval=None)
    with matplotlib.rc_context({"font.size": 31.0}):
        before = dict(matplotlib.rcParams)
        write_report(tmp_path)
        large = (tmp_path / "loss.png").read_bytes()
        assert dict(matplotlib.rcParams) == before
    write_report(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == large, "the user's own settings do not change the pictures"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (-38.61, "−38.6"), (1646.2, "1,646"), (0.0123, "0.0123"), (3e-9, "3.00e−09"), (1.5, "1.50")],
)
def test_number(value: float, text: str) -> None:
    assert drawing.number(value) == text


def test_numbers_of_one_column_can_be_told_apart() -> None:
    assert drawing.numbers([171.6, 172.2]) == ["171.6", "172.2"]
    assert drawing.numbers([-38.6, 1.4]) == ["−38.6", "1.4"]
    assert drawing.numbers([12.0, 12.0]) == ["12.0", "12.0"]
    assert drawing.numbers([1e9, 5e-9]) == ["1.00e+09", "5.00e−09"]
    assert drawing.numbers([1000.0, 1000.0000001]) == ["1,000.00", "1,000.00"], "at most six significant digits"


def test_ties_count_half_and_rewards_of_the_initial_model_do_not_exist(tmp_path: Path) -> None:
    even = scores(1) | {"pair_accuracy": 0.4, "pair_ties": 0.2, "reward_accuracy": 0.0, "reward_ties": 1.0}
    write_run(tmp_path, [stage(1, "easy", eval=even)], [], initial_eval=even | {"reward_accuracy": None})
    write_report(tmp_path)
    cells = Page((tmp_path / "report.html").read_text()).cells
    assert cells[5:7] == ["0.500", "–"]
    assert cells[16:18] == ["0.500", "0.500"]


def test_the_page_names_what_its_columns_mean(tmp_path: Path) -> None:
    write_run(tmp_path, [stage(1, "easy")], all_lines(1))
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    for term in ("pair accuracy", "reward accuracy", "reward margin", "reference margin", "M₀"):
        assert f"<dt>{term}</dt>" in text
    assert "<dt>lost tokens</dt>" not in text, "there is no such column"
    assert "γ reference" not in text


def test_settings_are_those_that_differ_from_their_defaults(tmp_path: Path) -> None:
    config = {"model": "<b>", "output_dir": "o", "beta": 0.3, "loss": "sigmoid", "lora": None}
    config |= {"trainer": {"seed": 42, "optim": "sgd"}}
    config |= {"stages": [{"name": "easy", "data": ["d"], "epochs": 1.0, "beta": None}]}
    write_run(tmp_path, [stage(1, "easy")], [], config=config)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    shown = text[text.index("<pre>") + 5 : text.index("</pre>")].splitlines()
    assert shown == [
        "model: &lt;b&gt;",
        "output_dir: o",
        "beta: 0.3",
        "stages:",
        "- name: easy",
        "  data:",
        "  - d",
        "trainer:",
        "  optim: sgd",
    ]


def test_pictures_are_legible_on_a_telephone_and_follow_the_scheme(tmp_path: Path) -> None:
    stages = [stage(1, "#0072b2"), stage(2, 'id="x"')]
    write_run(tmp_path, stages, [*all_lines(2), line(2, 8, eval_loss=0.3)])
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 8
    for svg in svgs:
        # 390 pixels less the page's margins are 344, that is 258 points
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", svg)]
        assert sizes
        assert min(sizes) * 344 / width > 8.5, "pixels"

        # every colour is a variable of the page, or the page could not be dark
        assert re.findall(r"<[^>]*#[0-9a-fA-F]{6}[^>]*>", svg.split(">", 1)[1]) == []
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(re.findall(r"--(\w+):", text.split("@media")[0]))

    ids = [name for svg in svgs for name in re.findall(r'<[^>]*\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    assert 'id="x"' in Page(text).cells[22]
    assert re.search(r"prefers-color-scheme: dark\) \{\s*:root \{ --page", text)


def test_a_second_report_of_the_same_run_is_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, [stage(1, "easy")], all_lines(1))
    write_report(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before

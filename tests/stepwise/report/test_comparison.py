"""The comparison of several models: its picture and its page."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from sdpo_kernels.stepwise.report.comparison import comparison_html, comparison_picture, wilson_interval
from tests.stepwise.report.folders import Page, png_size

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

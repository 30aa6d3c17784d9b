"""What the report's columns and pictures show: the texts that the report itself has, of a plain run of DPO."""

from __future__ import annotations

from collections.abc import Sequence

from docs.site.settings import table
from sdpo_kernels.stepwise.report.table import COLUMNS
from sdpo_kernels.stepwise.report.terms import captions

PLAIN_RUN = {
    "config": {"loss": "sigmoid", "trainer": {}},
    "stages": [{"index": 1, "name": "a", "loss": "sigmoid", "reference": "previous", "policy": "previous"}],
}


def part(words: Sequence[str]) -> str:
    """The table of columns, or that of pictures."""
    if words == ["columns"]:
        return table(("column", "what it is"), [(column.title, column.about) for column in COLUMNS if column.about])
    assert words == ["pictures"], words
    texts = captions(PLAIN_RUN, window=1, loss_terms=[])
    return table(("picture", "what it shows"), [(f"`{name}.png`", text) for name, text in texts.items()])

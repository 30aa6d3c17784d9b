"""Compare several trained models, in a picture and on a page; the demo ends with both.

    rows = [
        {"name": "SFT", "pair_accuracy": 0.61, "exactly_right": 0.22},
        {"name": "DPO", "pair_accuracy": 0.87, "exactly_right": 0.41, "gamma_reference": {"all": -3.1}},
        {"name": "sDPO", "pair_accuracy": 0.88, "exactly_right": 0.43,
         "gamma_reference": {"easy": -4.0, "medium": 1.2, "hard": 7.9}},
    ]
    picture = comparison_picture(Path("comparison.png"), rows, "Ten-digit sums")
    comparison_html(Path("comparison.html"), rows, "Ten-digit sums", picture)

Keys of a row: "name"; "pair_accuracy" and "exactly_right", each a share in [0, 1] or {group: share}, for example by
difficulty; optionally "pairs" and "prompts", the counts behind these two in the same form, for their 95 % intervals;
"gamma_reference", as {stage: nat}. Any other key becomes a column of the page's table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT,
    INK,
    ORANGE,
    SOFT_INK,
    bars,
    headline,
    label_right,
    number,
    percent_axis,
    picture_style,
    render,
    stage_axis,
)
from sdpo_kernels.stepwise.report.page import NOTHING, html_page, html_picture, html_table

Row = dict[str, Any]
COLORS = (GREY, ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
PANELS = (
    ("pair_accuracy", "pairs", "Pairs ranked right"),
    ("exactly_right", "prompts", "Answers exactly right"),
)
PANEL_WIDTH = 3.1  # inches


def comparison_picture(path: Path, rows: Sequence[Row], title: str) -> Path:
    """Write a PNG with one panel each for pair accuracy, exactly right answers and the references' log-prob margin.

    rows: see the module. Panels without data are left out. In the panel of margins, a row with several stages is drawn
    as bars, a row with one stage as a dashed line. ValueError: no rows, a share outside [0, 1], nothing to draw.
    """
    check_rows(rows)

    # the panels that have data, each as a function that draws it
    draws = [share_panel(rows, *panel) for panel in PANELS if any(panel[0] in row for row in rows)]
    if any(row.get("gamma_reference") for row in rows):
        draws.append(lambda ax: gamma_panel(ax, rows))
    if not draws:
        raise ValueError("rows: none has pair_accuracy, exactly_right or gamma_reference, so there is nothing to draw")

    with picture_style():
        figure = Figure(figsize=(PANEL_WIDTH * len(draws), HEIGHT))
        headline(figure, title, subtitle(rows), head=0.2)
        for ax, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            draw(ax)

        # without groups, each bar has its model's name below it
        if any(isinstance(row.get(key), dict) for row in rows for key, _, _ in PANELS):
            name_colors(figure, rows)
        replace_file(Path(path), render(figure))
    return Path(path)


def comparison_html(path: Path, rows: Sequence[Row], title: str, picture: Path, note: str = "") -> Path:
    """Write a self-contained page with `title`, `note` (a paragraph), the PNG `picture` and `rows` as a table."""
    check_rows(rows)

    # a column for every key of any row
    table = [flat(row) for row in rows]
    keys = list(dict.fromkeys(key for row in table for key in row))
    cells = [[table_value(key, row.get(key)) for key in keys] for row in table]
    titles = [(key.replace("_", " ").replace("gamma", "log-prob margin"), key == "name") for key in keys]

    parts = [f"<h1>{escape(title)}</h1>", f'<p class="facts">{escape(note)}</p>' if note else ""]
    parts += [html_picture(Path(picture).read_bytes(), title), html_table(titles, cells)]
    replace_file(Path(path), html_page(title, "\n".join(parts)).encode("utf-8", "replace"))
    return Path(path)


def check_rows(rows: Sequence[Row]) -> None:
    """Raise ValueError unless every row has a name and shares in [0, 1]."""
    if not rows:
        raise ValueError("rows is empty, must contain at least one model")

    for row in rows:
        if not isinstance(row.get("name"), str):
            raise ValueError(f'rows: {row!r} has no "name"')
        for key, _, _ in PANELS:
            for share in groups(row.get(key)).values():
                if not 0 <= share <= 1:
                    raise ValueError(f"rows: {key} of {row['name']} is {share}, must be a share in [0, 1]")


def groups(value: Any) -> dict[str, Any]:
    """`value` as {group: value}: a single value becomes the group ""; None becomes {}."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else {"": value}


def share_panel(rows: Sequence[Row], key: str, count_key: str, title: str) -> Callable[[Axes], None]:
    """A function that draws `key` of all rows: one bar per model, grouped if the rows have groups."""

    def draw(ax: Axes) -> None:
        names = list(dict.fromkeys(name for row in rows for name in groups(row.get(key))))

        # groups are one unit apart, and their bars share 0.84 of it
        width = 0.84 / len(rows) if len(names) > 1 else 0.6
        crowd = len(names) * len(rows)
        for place, row in enumerate(rows):
            counts = groups(row.get(count_key))
            for name, share in groups(row.get(key)).items():
                x = names.index(name) + (place + 0.5) * width - 0.42 if len(names) > 1 else float(place)
                count = counts.get(name)
                interval = wilson_interval(share, count) if count else None
                text = f"{share:.1%}" if crowd <= 4 else f"{share * 100:.0f}"
                size = 9 if crowd <= 9 else 7
                share_bar(ax, x, share, interval, text, width * 0.94, COLORS[place % len(COLORS)], fontsize=size)

        if len(names) > 1:
            ax.set_xticks(range(len(names)), names)
        else:
            ax.set_xticks(range(len(rows)), [row["name"] for row in rows])
            ax.set_xlim(-0.6, len(rows) - 0.4)

        ax.set_ylim(0, 1.06)
        percent_axis(ax)
        plain_axes(ax, title)

    return draw


def share_bar(
    ax: Axes,
    x: float,
    share: float,
    interval: tuple[float, float] | None,
    text: str,
    width: float,
    color: str,
    *,
    fontsize: int = 9,
    label: str | None = None,
) -> None:
    """One bar with `text` above it and a thin line for its interval, if there is one; `label` is for the legend."""
    ax.bar(x, share, width, color=color, zorder=2, label=label)

    top = share
    if interval is not None:
        low, top = interval
        ax.vlines(x, low, top, colors=INK, linewidth=1.0, zorder=3)

    # above the interval, so that the line does not cross the text
    ax.annotate(text, (x, top), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=fontsize)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials (Wilson 1927), which also holds near 0 and 1."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def gamma_panel(ax: Axes, rows: Sequence[Row]) -> None:
    """Log-prob margin of the reference: bars by stage for rows with several stages, a dashed line for rows with one."""
    # if no row has several stages, the first one gives the bars
    colored = [(row, COLORS[place % len(COLORS)]) for place, row in enumerate(rows) if row.get("gamma_reference")]
    staged = [pair for pair in colored if len(pair[0]["gamma_reference"]) > 1] or colored[:1]

    width = 0.64 / len(staged)
    longest = max((list(row["gamma_reference"]) for row, _ in staged), key=len)
    for place, (row, color) in enumerate(staged):
        values = list(row["gamma_reference"].values())
        x = [stage + (place + 0.5) * width - 0.32 for stage in range(1, len(values) + 1)]
        others = [v for row, _ in staged for v in row["gamma_reference"].values()] if len(staged) > 1 else []
        bars(ax, x, values, width * 0.96, color, others)

    # the panel's title names the axis already
    stage_axis(ax, list(enumerate(longest, 1)), PANEL_WIDTH - 0.7)
    ax.set_xlabel("")

    for row, color in colored:
        if len(row["gamma_reference"]) == 1 and (row, color) not in staged:
            (value,) = row["gamma_reference"].values()
            ax.axhline(value, color=color, linewidth=1.4, linestyle=(0, (4, 2)), zorder=2.2)
            label_right(ax, value, row["name"], color)

    ax.set_ylabel("nat")
    names = ", ".join(row["name"] for row, _ in staged)
    plain_axes(ax, "Log-prob margin, reference" + (f": {names}" if len(names) <= 8 else ""))


def plain_axes(ax: Axes, title: str) -> None:
    """Put a panel's title at its left, and remove the ticks below the bars."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.spines["bottom"].set_color(SOFT_INK)


def subtitle(rows: Sequence[Row]) -> str:
    """The subtitle: the counts behind the shares, if they are the same in all rows; otherwise the models' names."""
    facts = []
    for _, count_key, _ in PANELS:
        counts = {str(row.get(count_key)): row[count_key] for row in rows if count_key in row}
        if len(counts) == 1:
            facts.append(f"{sum(groups(next(iter(counts.values()))).values()):,} held-out {count_key}")
    facts += ["thin lines: 95% intervals"] if any(key in row for row in rows for _, key, _ in PANELS) else []
    return " · ".join(facts) or " · ".join(row["name"] for row in rows)


def name_colors(figure: Figure, rows: Sequence[Row]) -> None:
    """A legend of the models' colours at the figure's upper right."""
    handles = [Patch(color=COLORS[place % len(COLORS)], label=row["name"]) for place, row in enumerate(rows)]
    legend = figure.legend(
        handles=handles,
        loc="upper right",
        ncols=len(rows),
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.4,
        borderaxespad=0.3,
    )

    # otherwise the layout engine would shrink the panels to make room for it
    legend.set_in_layout(False)


def flat(row: Row) -> Row:
    """`row` with groups as keys of their own: {"exactly_right": {"easy": 0.9}} becomes {"exactly_right, easy": 0.9}."""
    spread: Row = {}
    for key, value in row.items():
        for group, inner in groups(value).items():
            spread[f"{key}, {group}" if group else key] = inner
    return spread


def table_value(key: str, value: Any) -> str:
    """A cell of the page's table."""
    if value is None:
        return NOTHING
    if key.startswith(tuple(panel[0] for panel in PANELS)):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)

"""The look of every picture: palette, fonts, sizes, and the small parts that all pictures share.

Pictures are `Figure` objects drawn inside `picture_style()`, so neither pyplot's state nor the user's matplotlibrc
changes them. Used by `curves.py` and `pictures.py` (a run) and `comparison.py` (several models).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, TypeGuard

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's palette: distinguishable with every common form of colour blindness, and in greyscale.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A9099"
INK, SOFT_INK, RULE, BAND = "#20262E", "#5B6470", "#E3E6EA", "#F5F7F9"

HEIGHT = 3.5  # inches, of a picture that has its page to itself
SMALL_WIDTH, SMALL_HEIGHT = 3.9, 2.7  # inches, of one of a run: at this size its text is legible on a telephone too
SCREEN_DPI = 100  # a picture is shown at this density ...
PICTURE_DPI = 2 * SCREEN_DPI  # ... and drawn at twice that, for sharp text on dense screens

EVALUATION = "evaluation"  # the name of values that are drawn as dots

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same look on every machine
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a stage may be called "$x"
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.labelcolor": SOFT_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.limits": (-5, 6),
    "axes.formatter.useoffset": False,  # ticks are whole values, with as many digits as tell them apart
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.solid_capstyle": "round",
}


def picture_style() -> AbstractContextManager[None]:
    """Context manager: matplotlib's own defaults plus STYLE."""
    return matplotlib.style.context(["default", STYLE])


def render(figure: Figure) -> bytes:
    """`figure` as PNG bytes, at twice the screen's density. Call it inside `picture_style()`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PICTURE_DPI, facecolor="white")

    # laid out once: drawn again, as SVG, everything stays where it is
    figure.set_layout_engine("none")
    return buffer.getvalue()


def canvas(title: str, names: Sequence[tuple[str, str]] = ()) -> tuple[Figure, Axes]:
    """A small figure with a title and one pair of axes; `names` are (name, colour) of its lines, written below it."""
    figure = Figure(figsize=(SMALL_WIDTH, SMALL_HEIGHT))
    figure.text(0.08 / SMALL_WIDTH, 1 - 0.06 / SMALL_HEIGHT, title, fontsize=10.5, fontweight="bold", va="top")
    if names:
        name_lines(figure, names)

    room = 1 - (0.5 if names else 0.3) / SMALL_HEIGHT
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0.005, 0.005, 0.99, room), w_pad=0.05, h_pad=0.04))
    return figure, figure.add_subplot()


def name_lines(figure: Figure, names: Sequence[tuple[str, str]]) -> None:
    """A legend in one row below the title."""
    legend = figure.legend(
        handles=[line_handle(name, color) for name, color in names],
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.24 / SMALL_HEIGHT),
        ncols=len(names),
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.4,
        borderaxespad=0,
    )

    # otherwise the layout engine would move the axes for it
    legend.set_in_layout(False)


def headline(figure: Figure, title: str, subtitle: str, head: float) -> None:
    """Title and subtitle; a layout engine puts the axes below them, `head` inches lower."""
    write_headline(figure, title, subtitle)
    height = figure.get_size_inches()[1]
    room = 1 - (0.42 + head) / height
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, room), w_pad=0.06, h_pad=0.04))


def write_headline(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the figure's upper left."""
    width, height = figure.get_size_inches()
    left = 0.12 / width
    figure.text(left, 1 - 0.10 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(left, 1 - 0.34 / height, subtitle, fontsize=9, color=SOFT_INK, va="top")


def line_handle(name: str, color: str) -> Line2D:
    """A line of a legend; a dot for EVALUATION."""
    if name == EVALUATION:
        return Line2D([], [], color=color, linestyle="none", marker="o", markersize=5, label=name)
    return Line2D([], [], color=color, linewidth=2.2, label=name)


def bars(
    ax: Axes, x: Sequence[float], values: Sequence[float], width: float, color: str, others: Sequence[float] = ()
) -> None:
    """Bars with their values written at their ends, all to the same number of decimals, and a line at zero.

    `others` are the values of the panel's other bars: they share the number of decimals, and make the text smaller.
    """
    drawn = ax.bar(x, values, width, color=color, zorder=2)
    fontsize = 9 if len(x) <= 12 and not others else 7
    ax.bar_label(drawn, numbers(values, others), padding=4, fontsize=fontsize)

    ax.axhline(0, color=GREY, linewidth=0.9, zorder=2.5)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.14)


def dots(ax: Axes, x: Sequence[float], values: Sequence[float], color: str) -> None:
    """The values as dots with their numbers, on an axis that starts near the smallest: bars would all look equal."""
    ax.plot(x, values, "o", color=color, markersize=6, zorder=3)
    for place, value, text in zip(x, values, numbers(values), strict=True):
        size = 9 if len(x) <= 6 else 7
        ax.annotate(text, (place, value), (0, 7), textcoords="offset points", ha="center", fontsize=size)
    ax.margins(y=0.3)


def stage_axis(ax: Axes, stages: Sequence[tuple[int, str]], width: float = SMALL_WIDTH - 0.8) -> None:
    """Label stages given as (number, name) below `ax` (`width` inches wide): numbers, and names as far as they fit."""
    # one or two bars would fill the axes: leave as much room as for three
    edge = max(0.6, 2.1 - len(stages) / 2)
    ax.set_xlim(stages[0][0] - edge, stages[-1][0] + edge)

    # names cut to a few letters are useless: leave them out, and at most 25 numbers
    room = width / (stages[-1][0] - stages[0][0] + 2 * edge)
    if room < 0.75:
        stages = [(index, "") for index, _ in stages[:: math.ceil(len(stages) / 25)]]

    ax.set_xticks([index for index, _ in stages], [stage_label(index, name, room) for index, name in stages])
    ax.set_xlabel("stage")


def stage_label(index: int, name: str, room: float, sep: str = "\n") -> str:
    """A stage's number and, if `room` (inches) allows, its name, shortened to fit."""
    name = " ".join(name.split())
    letters = int((room - 0.1) / 0.082) - (len(f"{index} ") if sep == " " else 0)
    if letters < 4 or not name or not drawable(name):
        return str(index) if room > 0.12 else ""
    return f"{index}{sep}{name if len(name) <= letters else name[: letters - 1] + '…'}"


@lru_cache(maxsize=256)
def drawable(text: str) -> bool:
    """Whether the font has every character of `text` (it has no Chinese, Japanese or Korean ones)."""
    glyphs = get_font(findfont(STYLE["font.family"])).get_charmap()
    return all(ord(character) in glyphs for character in text)


def label_right(ax: Axes, y: float, text: str, color: str, shift: float = 0.0) -> None:
    """Write `text` just right of the axes at height `y`, moved up by `shift` points."""
    ax.annotate(
        text,
        (1, y),
        (5, shift),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=color,
        annotation_clip=False,
    )


def percent_axis(ax: Axes) -> None:
    """Show shares as per cent on the y axis."""
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}%"))


def model_name(index: int) -> str:
    """M with the stage's index as subscript: M₀, M₁, … M₁₂."""
    return "M" + str(index).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number, which can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def numbers(values: Sequence[float], others: Sequence[float] = ()) -> list[str]:
    """The values to one number of decimals, so that they can be compared; `others` count for it but are not written.

    Three significant digits of the greatest, and more where the values differ in less: 171.6 and 172.2, not 172 twice.
    """
    known = [value for value in [*values, *others] if finite(value)]
    greatest = max(map(abs, known), default=0.0)
    if not 1e-4 <= greatest < 1e6:
        return [number(value) if finite(value) else str(value) for value in values]

    decimals = 2 - math.floor(math.log10(greatest))
    spread = max(known) - min(known)
    if spread > 0:
        # one digit of the spread, up to six significant digits in all
        decimals = max(decimals, min(-math.floor(math.log10(spread)), decimals + 3))
    texts = [f"{value:,.{max(0, decimals)}f}" if finite(value) else str(value) for value in values]
    return [text.replace("-", "−") for text in texts]


def number(value: float) -> str:
    """Three significant digits, no exponent for everyday sizes, a true minus sign."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("-", "−")
    decimals = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit for a span of `seconds`, as (seconds per unit, name)."""
    return next((unit for unit in ((3600.0, "hours"), (60.0, "minutes")) if seconds >= 2 * unit[0]), (1.0, "seconds"))


def memory_unit(size: float) -> tuple[float, str]:
    """The unit for `size` bytes, as (bytes per unit, name)."""
    return (2.0**30, "GiB") if size >= 2**30 else (2.0**20, "MiB")

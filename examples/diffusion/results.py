"""The results: the judge's verdicts on both models' samples, as a table, a picture and results.json.

found = [findings("before", images), findings("after", preferred)]
console.print(result_table(found)); write_picture(Path("diffusion.png"), found)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from examples.diffusion.judge import judge
from examples.diffusion.shapes import PREFERRED, SIDE
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.report.comparison import share_bar, wilson_interval
from sdpo_kernels.stepwise.report.drawing import (
    BLUE,
    GREY,
    HEIGHT,
    INK,
    percent_axis,
    picture_style,
    render,
    write_headline,
)

TITLE = "Diffusion-DPO: a denoiser of circles and squares learns to prefer circles"
ROWS, COLUMNS = 6, 8  # of samples shown from each model
FIGURE_WIDTH = 9.6  # inches


@dataclass(frozen=True)
class Share:
    """`hits` of `count` trials, and the 95 % interval of their share (Wilson)."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share; 0 without trials."""
        return self.hits / max(1, self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high); (0, 1) without trials."""
        return wilson_interval(self.value, self.count) if self.count else (0.0, 1.0)

    def record(self) -> dict[str, Any]:
        """For results.json."""
        share = self.value if self.count else None
        return {"share": share, "interval_95": list(self.interval), "hits": self.hits, "of": self.count}


@dataclass(frozen=True)
class Findings:
    """The judge's verdicts on a model's samples [N, 1, 16, 16], counted."""

    name: str
    images: Tensor
    circles: Share  # among the valid shapes
    valid: Share  # among all
    spread: float  # standard deviation of the valid shapes' positions, in pixels: a measure of variety

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "name": self.name,
            "circles_among_valid": self.circles.record(),
            "valid": self.valid.record(),
            "spread_of_places_pixels": self.spread,
        }


def findings(name: str, images: Tensor) -> Findings:
    """Judge `images`, and count the verdicts."""
    verdict = judge(images)
    n_valid = int(verdict.valid.sum())
    circles = Share(int((verdict.circle & verdict.valid).sum()), n_valid)
    places = verdict.places[verdict.valid]
    spread = places.std(0, correction=0).mean().item() if n_valid else 0.0
    return Findings(name, images, circles, Share(n_valid, len(images)), spread)


def clear_win(before: Findings, after: Findings) -> bool:
    """Whether the interval of the share of circles is entirely above the one before."""
    return after.circles.interval[0] > before.circles.interval[1]


def result_table(found: Sequence[Findings]) -> Table:
    """Shares with their 95 % intervals, one column per model."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    table.add_column(f"{found[0].valid.count:,} samples each, same noise", no_wrap=True)
    for each in found:
        table.add_column(each.name, justify="right")
    table.add_row(f"{PREFERRED}s among valid shapes", *(with_interval(each.circles) for each in found), style="bold")
    table.add_row("valid shapes among all", *(with_interval(each.valid) for each in found))
    table.add_row("spread of their places", *(f"{each.spread:.2f} px" for each in found))
    return table


def with_interval(share: Share) -> str:
    """54.0% (49.1–58.8); a dash without trials."""
    if not share.count:
        return "–"
    low, high = share.interval
    return f"{share.value:.1%} ({low * 100:.1f}–{high * 100:.1f})"


def write_picture(path: Path, found: Sequence[Findings]) -> Path:
    """Write a PNG: samples of each model in a grid, from the same noise, and the shares as bars."""
    with picture_style():
        figure = Figure(figsize=(FIGURE_WIDTH, HEIGHT))
        write_headline(figure, TITLE, subtitle(found))

        # fixed places: both grids keep their size, whatever the space that labels need
        places = [(0.0125, 0.02, 0.345, 0.78), (0.3725, 0.02, 0.345, 0.78), (0.78, 0.15, 0.21, 0.58)]
        panels = [figure.add_axes(place) for place in places]
        for ax, each in zip(panels, found, strict=False):
            grid_panel(ax, each)
        share_panel(panels[-1], found)

        replace_file(path, render(figure))
    return path


def subtitle(found: Sequence[Findings]) -> str:
    """The number of samples, and what the thin lines are."""
    return (
        f"{found[0].valid.count:,} samples of each model from the same noise, {ROWS * COLUMNS} shown · "
        "thin lines: 95% intervals"
    )


def grid_panel(ax: Axes, each: Findings) -> None:
    """The first samples in a grid, one pixel apart."""
    shown = torch.ones(ROWS * (SIDE + 1) - 1, COLUMNS * (SIDE + 1) - 1)
    for number, image in enumerate(each.images[: ROWS * COLUMNS, 0]):
        top, left = (SIDE + 1) * (number // COLUMNS), (SIDE + 1) * (number % COLUMNS)
        shown[top : top + SIDE, left : left + SIDE] = (image.clamp(-1, 1) + 1) / 2

    ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(each.name, loc="left", fontsize=10, color=INK, pad=5)
    ax.set_axis_off()
    ax.set_anchor("NW")


def share_panel(ax: Axes, found: Sequence[Findings]) -> None:
    """Circles among valid shapes and valid shapes among all, one bar per model."""
    # two groups of bars, one bar per model in each
    groups = [[each.circles for each in found], [each.valid for each in found]]
    for group, shares in enumerate(groups):
        for place, (share, color) in enumerate(zip(shares, (GREY, BLUE), strict=True)):
            x = group + 0.4 * (place - 0.5)
            name = found[place].name if group == 0 else None  # one entry per model in the legend
            share_bar(ax, x, share.value, share.interval, f"{share.value:.0%}", 0.38, color, label=name)

    ax.set_xticks([0, 1], [f"{PREFERRED}s among\nvalid shapes", "valid shapes\namong all"])
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.set_ylim(0, 1.09)
    percent_axis(ax)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.2, 1.02), ncols=2, frameon=False, handlelength=0.9, borderaxespad=0.2
    )

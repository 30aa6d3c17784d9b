"""The pictures over the steps of a run: losses, rewards, log-probs, gradient norm, learning rate.

curves = Curves.of(manifest, lines)
figure = reward_picture(curves)         # None if the run has nothing for it yet
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sdpo_kernels.stepwise.report.drawing import (
    BAND,
    BLUE,
    EVALUATION,
    GREEN,
    GREY,
    ORANGE,
    SMALL_WIDTH,
    SOFT_INK,
    canvas,
    finite,
    label_right,
    percent_axis,
    stage_label,
)

Record = dict[str, Any]
Decorate = Callable[[Axes], None]
Line = tuple[str, str, str]  # key of metrics.jsonl, name, colour

MOST_POINTS = 500  # of a curve that is drawn


@dataclass(frozen=True)
class Curves:
    """What all curves share: the stages, the logged lines sorted by step, and the levels that losses start at."""

    stages: Sequence[Record]
    lines: Sequence[Record]
    levels: Mapping[int, float]  # by the stage's index

    @property
    def spans(self) -> dict[int, tuple[float, float]]:
        """{stage index: (first global step, last one)}; a stage ends where the next one starts."""
        spans: dict[int, tuple[float, float]] = {}
        for line in self.lines:
            index, last = line["stage/index"], line["stage/global_step"]
            start = last - line["step"]
            old = spans.get(index, (start, last))
            spans[index] = (min(old[0], start), max(old[1], last))

        # the last step of a stage need not be logged: extend it to the next stage's start
        for index, following in itertools.pairwise(sorted(spans)):
            spans[index] = (spans[index][0], spans[following][0])
        return spans

    @property
    def terms(self) -> list[str]:
        """The names of the terms of a sum of losses; none of a single loss."""
        # they name files, and the lines may have been edited
        keys = dict.fromkeys(key for line in self.lines for key in line)
        return [key[5:] for key in keys if re.fullmatch(r"loss/\w{1,64}", key)]

    @property
    def window(self) -> int:
        """How many logged steps the mean of a curve is over; 1 is no mean. A tenth of the longest stage."""
        counts = [len(x) for x, _ in points(self.lines, "loss").values()]
        count = max(counts, default=0)
        return 1 if count < 40 else count // 10


def loss_picture(curves: Curves) -> Figure | None:
    """The loss over all steps, with a dashed line in the stages whose loss starts at a known value."""

    def start_lines(ax: Axes) -> None:
        spans = curves.spans
        known = [(spans[index], level) for index, level in curves.levels.items() if index in spans]
        for (start, end), level in known:
            ax.hlines(level, start, end, colors=SOFT_INK, linewidth=0.9, linestyles=(0, (4, 3)), zorder=1.5)
        if known:
            label_right(ax, known[-1][1], f"{known[-1][1]:.3f}", SOFT_INK)

    return curve_picture(curves, "Loss", "", [("loss", "loss", BLUE)], start_lines)


def term_pictures(curves: Curves) -> dict[str, Figure | None]:
    """One picture for each term of a sum of losses, times its weight; each needs an axis of its own."""
    return {
        f"loss_{name}": curve_picture(curves, f"Term of the loss: {name}", "", [(f"loss/{name}", name, BLUE)])
        for name in curves.terms
    }


def reward_picture(curves: Curves) -> Figure | None:
    """Mean reward of the chosen and of the rejected answers."""
    lines = [("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)]
    return curve_picture(curves, "Rewards", "β × nat", lines, zero_line)


def margin_picture(curves: Curves) -> Figure | None:
    """Mean reward of the chosen minus that of the rejected answers."""
    return curve_picture(curves, "Reward margin", "β × nat", [("rewards/margins", "margin", BLUE)], zero_line)


def accuracy_picture(curves: Curves) -> Figure | None:
    """The share of pairs whose chosen answer has the higher reward; a tie counts half."""

    def full_scale(ax: Axes) -> None:
        ax.set_ylim(-0.02, 1.02)
        percent_axis(ax)
        ax.axhline(0.5, color=SOFT_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)

    halved = [line | {f"{kind}accuracy": half_ties(line, kind) for kind in ("", "eval_")} for line in curves.lines]
    shown = Curves(curves.stages, halved, curves.levels)
    return curve_picture(shown, "Reward accuracy", "share of pairs", [("accuracy", "accuracy", BLUE)], full_scale)


def logps_picture(curves: Curves) -> Figure | None:
    """Mean log-probs of the chosen and of the rejected answers."""
    lines = [("logps/chosen", "chosen", BLUE), ("logps/rejected", "rejected", ORANGE)]
    return curve_picture(curves, "Log-probs", "nat", lines)


def gradient_picture(curves: Curves) -> Figure | None:
    """The norm of the gradient before clipping."""
    return curve_picture(curves, "Gradient norm", "", [("grad_norm", "norm", GREY)])


def rate_picture(curves: Curves) -> Figure | None:
    """The learning rate."""

    def plain(ax: Axes) -> None:
        ax.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.4g}".replace("e-0", "e-").replace("-", "−"))
        )
        ax.set_ylim(bottom=0)

    lines = [("learning_rate", "rate", GREY)]
    return curve_picture(curves, "Learning rate", "", lines, plain, smooth=False)


def half_ties(line: Record, kind: str = "") -> float | None:
    """Reward accuracy with ties counted half; `kind` is "eval_" for an evaluation.

    The logged accuracy counts a tie as wrong. Earlier versions did not log the share of ties, but an accuracy of 0 at a
    mean margin of 0 means that all are.
    """
    accuracy, ties = line.get(f"{kind}rewards/accuracies"), line.get(f"{kind}rewards/ties")
    if not finite(accuracy):
        return None
    if not finite(ties):
        ties = float(accuracy == 0 and line.get(f"{kind}rewards/margins") == 0)
    return accuracy + ties / 2


def zero_line(ax: Axes) -> None:
    """A line at 0, where policy and reference are equal."""
    ax.axhline(0, color=GREY, linewidth=0.9, zorder=1.5)


def curve_picture(
    curves: Curves,
    title: str,
    unit: str,
    lines: Sequence[Line],
    decorate: Decorate = lambda ax: None,
    *,
    smooth: bool = True,
) -> Figure | None:
    """A picture of some metrics over the steps; None without data.

    1. One curve for each metric and stage; long ones are pale, with their mean so far on top.
    2. The evaluations of each metric, if they were logged, as dots.
    3. The axis of steps, over all stages, with the stages marked.
    4. `decorate` adds what only this picture has: a level, a scale.
    """
    trained = {key: points(curves.lines, key) for key, _, _ in lines}
    evaluated = {key: points(curves.lines, f"eval_{key}") for key, _, _ in lines}
    if not any(trained.values()) and not any(evaluated.values()):
        return None

    # the name of a single line is the title; evaluations are dots, green beside a single line
    names = [(name, color) for _, name, color in lines] if len(lines) > 1 else []
    if any(evaluated.values()):
        names = [*names, (EVALUATION, SOFT_INK)] if names else [("training", lines[0][2]), (EVALUATION, GREEN)]
    figure, ax = canvas(title, names)

    # markers only while they do not touch each other
    window = curves.window if smooth else 1
    marker = "o" if sum(len(x) for x, _ in trained[lines[0][0]].values()) <= 40 else None
    for key, _, color in lines:
        for x, y in trained[key].values():
            draw_curve(ax, x, y, window, marker, color)
        for x, y in evaluated[key].values():
            style: Record = {"linewidth": 1.1, "markersize": 6, "markeredgecolor": "white", "zorder": 6}
            ax.plot(x, y, "o-", color=color if len(lines) > 1 else GREEN, clip_on=False, **style)

    step_axis(ax, curves)
    ax.set_ylabel(unit)
    decorate(ax)
    return figure


def step_axis(ax: Axes, curves: Curves) -> None:
    """The axis of steps over all stages."""
    # the tiny addition keeps the limits apart if only a step 0 is logged
    spans = curves.spans
    ax.set_xlim(min(start for start, _ in spans.values()), max(end for _, end in spans.values()) + 1e-9)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel("step")
    if len(curves.stages) > 1:
        mark_stages(ax, curves.stages, spans)


def points(lines: Sequence[Record], key: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{stage index: (global steps, values of `key`)}, both float64 [n]; values that are not finite are left out."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in lines:
        value = line.get(key)
        if finite(value):
            found.setdefault(line["stage/index"], []).append((line["stage/global_step"], value))
    return {index: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for index, pairs in found.items()}


def mean_so_far(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the `window` − 1 before it, [n]; it starts at the first value and never looks ahead."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    first = (end - window).clip(min=0)
    return (total[end] - total[first]) / (end - first)


def draw_curve(ax: Axes, x: np.ndarray, y: np.ndarray, window: int, marker: str | None, color: str) -> None:
    """One stage's curve: a pale line under its mean so far, or one plain line if `window` is 1."""
    if window == 1:
        marker = "o" if len(x) == 1 else marker  # a line with a single point is invisible
        ax.plot(*thinned(x, y), color=color, linewidth=1.5, marker=marker, markersize=3, zorder=3, clip_on=False)
        return
    ax.plot(*thinned(x, y), color=color, linewidth=0.7, alpha=0.3, zorder=2)
    ax.plot(*thinned(x, mean_so_far(y, window)), color=color, linewidth=1.8, zorder=3)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MOST_POINTS of the points: of each run of neighbours the lowest and the highest, and both ends."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for block in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        kept |= {int(block[y[block].argmin()]), int(block[y[block].argmax()])}
    order = sorted(kept)
    return x[order], y[order]


def mark_stages(ax: Axes, stages: Sequence[Record], spans: dict[int, tuple[float, float]]) -> None:
    """Separate the stages by bands and lines, with their names above the axes as far as they fit."""
    low, high = ax.get_xlim()
    names = {stage["index"]: stage["name"] for stage in stages}
    for place, (index, (start, end)) in enumerate(sorted(spans.items())):
        if place % 2:
            ax.axvspan(start, end, color=BAND, zorder=0)
        if place:
            ax.axvline(start, color=GREY, linewidth=0.8, zorder=1.2)

        # the name is centred over its stage, and cut to the stage's width in inches
        room = (end - start) / max(high - low, 1) * (SMALL_WIDTH - 0.8)
        ax.annotate(
            stage_label(index, names.get(index, ""), room, sep=" "),
            ((start + end) / 2, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=SOFT_INK,
        )

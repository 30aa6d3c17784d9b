"""The pictures of a run: curves over steps, bars by stage, lines over the models M₀, M₁, ….

`run_pictures(manifest, lines)` draws what a run wrote, as PNG bytes; only pictures that have data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sdpo_kernels.losses import starts_at_ln2
from sdpo_kernels.stepwise.report.drawing import (
    BAND,
    BLUE,
    GREY,
    ORANGE,
    SOFT_INK,
    WIDTH,
    bars,
    canvas,
    finite,
    label_ends,
    label_right,
    memory_unit,
    model_name,
    number,
    percent_axis,
    picture_style,
    render,
    stage_axis,
    stage_label,
    time_unit,
)

Record = dict[str, Any]


def run_pictures(manifest: Record, lines: Sequence[Record]) -> dict[str, bytes]:
    """The pictures of a run as {file name: PNG bytes}, in reading order; those without data are left out.

    manifest: a run's manifest.json; lines: the objects of its metrics.jsonl, sorted by "stage/global_step".
    """
    stages = manifest["stages"]
    models = scored_models(manifest)

    # each function returns None if the run has nothing for it yet
    with picture_style():
        figures = {
            "loss.png": loss_picture(stages, lines),
            "reward_margin.png": margin_picture(stages, lines),
            "reward_accuracy.png": accuracy_picture(stages, lines),
            "gamma_reference.png": gamma_reference_picture(stages),
            "eval_accuracy.png": eval_accuracy_picture(models),
            "eval_gamma.png": eval_gamma_picture(models),
            "time.png": time_picture(stages),
            "memory.png": memory_picture(stages),
        }
        return {name: render(figure) for name, figure in figures.items() if figure is not None}


def scored_models(manifest: Record) -> list[tuple[int, Record]]:
    """The models scored on the evaluation pairs, as (t, scores) of M_t; M_0 is the initial model."""
    scored = [(0, manifest.get("initial_eval"))]
    scored += [(stage["index"], stage.get("eval")) for stage in manifest["stages"]]
    return [(index, scores) for index, scores in scored if scores]


# ---- over steps ----


def loss_picture(stages: Sequence[Record], lines: Sequence[Record]) -> Figure | None:
    """The loss over all steps, with a line at ln 2 in the stages whose loss starts there."""

    def ln2_line(ax: Axes, spans: dict[int, tuple[float, float]]) -> None:
        losses = {stage["index"]: stage.get("loss", "sigmoid") for stage in stages}
        known = [span for index, span in spans.items() if starts_at_ln2(losses.get(index, ""))]
        for start, end in known:
            ax.hlines(math.log(2), start, end, colors=SOFT_INK, linewidth=0.9, linestyles=(0, (4, 3)), zorder=1.5)
        if known:
            label_right(ax, math.log(2), "ln 2", SOFT_INK)

    return curve_picture(stages, lines, "loss", "Loss", "loss", ln2_line)


def margin_picture(stages: Sequence[Record], lines: Sequence[Record]) -> Figure | None:
    """Mean reward of the chosen minus that of the rejected answers, over all steps."""

    def zero_line(ax: Axes, spans: dict[int, tuple[float, float]]) -> None:
        ax.axhline(0, color=GREY, linewidth=0.9, zorder=1.5)

    return curve_picture(stages, lines, "rewards/margins", "Reward margin", "chosen − rejected (β × nat)", zero_line)


def accuracy_picture(stages: Sequence[Record], lines: Sequence[Record]) -> Figure | None:
    """The share of pairs whose chosen answer has the higher reward, over all steps."""

    def full_scale(ax: Axes, spans: dict[int, tuple[float, float]]) -> None:
        ax.set_ylim(-0.02, 1.02)
        percent_axis(ax)

    return curve_picture(
        stages, lines, "rewards/accuracies", "Reward accuracy", "pairs with chosen > rejected", full_scale
    )


def curve_picture(
    stages: Sequence[Record],
    lines: Sequence[Record],
    key: str,
    title: str,
    unit: str,
    decorate: Callable[[Axes, dict[int, tuple[float, float]]], None],
) -> Figure | None:
    """A picture of the metric `key` over the steps; None without data.

    1. One curve per stage; long ones are pale, with their moving mean on top.
    2. `eval_<key>`, if it was logged, as orange dots.
    3. The axis of steps, over all stages, with the stages marked.
    4. `decorate` adds what only this picture has: a level, a scale.
    """
    trained, evaluated = points(lines, key), points(lines, f"eval_{key}")
    if not trained and not evaluated:
        return None

    # markers only while they do not touch each other
    counts = [len(x) for x, _ in trained.values()]
    window = smoothing_window(max(counts, default=0))
    marker = "o" if sum(counts) <= 60 else None

    parts = [f"thin: each logged step · thick: mean over {window} of them"] if window > 1 else []
    parts += ["orange dots: evaluation"] if evaluated else []
    figure, ax = canvas(title, " · ".join(parts) or "at each logged step", head=0.2)

    for x, y in trained.values():
        draw_curve(ax, x, y, window, marker)
    for x, y in evaluated.values():
        style: Record = {"linewidth": 1.1, "markersize": 6, "markeredgecolor": "white", "zorder": 6, "clip_on": False}
        ax.plot(x, y, "o-", color=ORANGE, **style)

    # the tiny addition keeps the limits apart if only a step 0 is logged
    spans = stage_spans(lines)
    ax.set_xlim(min(start for start, _ in spans.values()), max(end for _, end in spans.values()) + 1e-9)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel("optimizer step, over all stages" if len(stages) > 1 else "optimizer step")
    ax.set_ylabel(unit)
    if len(stages) > 1:
        mark_stages(ax, stages, spans)

    decorate(ax, spans)
    return figure


def points(lines: Sequence[Record], key: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{stage index: (global steps, values of `key`)}, both float64 [n]; values that are not finite are left out."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in lines:
        value = line.get(key)
        if finite(value):
            found.setdefault(line["stage/index"], []).append((line["stage/global_step"], value))
    return {index: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for index, pairs in found.items()}


def smoothing_window(count: int) -> int:
    """Window of the moving mean: odd, a tenth of the longest stage; 1 (no moving mean) for short stages."""
    return 1 if count < 40 else count // 20 * 2 + 1


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` neighbours, [n]; near the ends over fewer."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(len(values))
    first = (position - window // 2).clip(min=0)
    end = (position + window // 2 + 1).clip(max=len(values))
    return (total[end] - total[first]) / (end - first)


def draw_curve(ax: Axes, x: np.ndarray, y: np.ndarray, window: int, marker: str | None) -> None:
    """One stage's curve: a pale line under its moving mean, or one plain line if `window` is 1."""
    if window == 1:
        marker = "o" if len(x) == 1 else marker  # a line with a single point is invisible
        ax.plot(x, y, color=BLUE, linewidth=1.5, marker=marker, markersize=3.5, zorder=3, clip_on=False)
        return
    ax.plot(x, y, color=BLUE, linewidth=0.7, alpha=0.3, zorder=2)
    ax.plot(x, moving_mean(y, window), color=BLUE, linewidth=1.9, zorder=3)


def stage_spans(lines: Sequence[Record]) -> dict[int, tuple[float, float]]:
    """{stage index: (first global step, last one)}; a stage ends where the next one starts."""
    spans: dict[int, tuple[float, float]] = {}
    for line in lines:
        index, last = line["stage/index"], line["stage/global_step"]
        start = last - line["step"]
        old = spans.get(index, (start, last))
        spans[index] = (min(old[0], start), max(old[1], last))

    # the last step of a stage need not be logged: extend it to the next stage's start
    order = sorted(spans)
    for index, following in itertools.pairwise(order):
        spans[index] = (spans[index][0], spans[following][0])
    return spans


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
        room = (end - start) / max(high - low, 1) * (WIDTH - 0.9)
        label = stage_label(index, names.get(index, ""), room, sep=" ")
        ax.annotate(
            label,
            ((start + end) / 2, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=SOFT_INK,
        )


# ---- by stage and by model ----


def gamma_reference_picture(stages: Sequence[Record]) -> Figure | None:
    """γ of each stage's reference on that stage's pairs."""
    return stage_bars(
        stages,
        "gamma_reference",
        "γ of the reference, by stage",
        "mean of log π(chosen) − log π(rejected) on the stage's own pairs",
        lambda top: (1.0, "nat"),
        BLUE,
    )


def time_picture(stages: Sequence[Record]) -> Figure | None:
    """Wall time of each stage."""
    return stage_bars(stages, "seconds", "Time, by stage", "wall clock", time_unit, GREY)


def memory_picture(stages: Sequence[Record]) -> Figure | None:
    """Peak memory of each stage."""
    subtitle = "highest during each stage"
    return stage_bars(stages, "peak_memory_bytes", "Peak memory, by stage", subtitle, memory_unit, GREY)


def stage_bars(
    stages: Sequence[Record],
    key: str,
    title: str,
    subtitle: str,
    unit_of: Callable[[float], tuple[float, str]],
    color: str,
) -> Figure | None:
    """One bar per stage for `key` of the manifest; `unit_of` maps the largest value to (divisor, unit)."""
    known = [stage for stage in stages if finite(stage.get(key))]
    if not known:
        return None

    # bars for the stages that have a value, but all stages on the axis
    divisor, unit = unit_of(max(abs(stage[key]) for stage in known))
    figure, ax = canvas(title, subtitle)
    bars(ax, [stage["index"] for stage in known], [stage[key] / divisor for stage in known], 0.56, color)
    stage_axis(ax, [(stage["index"], stage["name"]) for stage in stages])
    ax.set_ylabel(unit)
    return figure


def eval_accuracy_picture(models: Sequence[tuple[int, Record]]) -> Figure | None:
    """Share of evaluation pairs that M₀, M₁, … rank correctly, by summed and by mean log-probability."""
    series = [("pair_accuracy", "summed log-prob", BLUE), ("pair_accuracy_per_token", "per token", GREY)]
    title, subtitle = "Pair accuracy on the evaluation pairs", "share with π(chosen) > π(rejected)"

    # the axis spans at least 8 percentage points, so that a change of 1 does not look dramatic
    figure = model_lines(models, series, title, subtitle, "{:.1%}".format, least_span=0.08)

    # no room for shares below 0 or above 1
    if figure is not None:
        low, high = figure.axes[0].get_ylim()
        figure.axes[0].set_ylim(max(low, -0.04), min(high, 1.04))
        percent_axis(figure.axes[0])
        figure.axes[0].set_ylabel("pairs ranked right")
    return figure


def eval_gamma_picture(models: Sequence[tuple[int, Record]]) -> Figure | None:
    """γ of M₀, M₁, … on the evaluation pairs."""
    subtitle = "mean of log π(chosen) − log π(rejected) after each stage"
    figure = model_lines(models, [("gamma", "", BLUE)], "γ on the evaluation pairs", subtitle, number)
    if figure is not None:
        figure.axes[0].set_ylabel("nat")
    return figure


def model_lines(
    models: Sequence[tuple[int, Record]],
    series: Sequence[tuple[str, str, str]],
    title: str,
    subtitle: str,
    write: Callable[[float], str],
    least_span: float = 0.0,
) -> Figure | None:
    """One line per (key, name, colour) over the models, named at its end; the first one also shows its values."""
    drawn = [(key, *rest) for key, *rest in series if any(finite(scores.get(key)) for _, scores in models)]
    if not drawn:
        return None

    # the first line is drawn on top
    figure, ax = canvas(title, subtitle)
    ends: list[tuple[float, str, str]] = []
    for place, (key, name, color) in enumerate(drawn):
        x, y = zip(*[(t, scores[key]) for t, scores in models if finite(scores.get(key))], strict=True)
        style: Record = {"linewidth": 1.8, "markersize": 6, "markeredgecolor": "white", "zorder": 3 - 0.1 * place}
        ax.plot(x, y, "o-", color=color, **style)
        ends.append((y[-1], name, color))
        if place == 0 and len(x) <= 10:
            write_values(ax, x, y, write)

    # widen a short y axis to `least_span`, around its middle
    ax.set_xlim(models[0][0] - 0.35, models[-1][0] + 0.35)
    ax.margins(y=0.22)
    low, high = ax.get_ylim()
    slack = max(0.0, least_span - (high - low)) / 2
    ax.set_ylim(low - slack, high + slack)

    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: model_name(round(value))))
    ax.set_xlabel("model (M₀ before the first stage, Mₜ after stage t)")
    label_ends(ax, ends)
    return figure


def write_values(ax: Axes, x: Sequence[int], y: Sequence[float], write: Callable[[float], str]) -> None:
    """Write each value above its point, with a white outline so that it stays readable over a line."""
    for place, value in zip(x, y, strict=True):
        weight = "bold" if place == x[-1] else "normal"
        text = ax.annotate(
            write(value), (place, value), (0, 8), textcoords="offset points", ha="center", fontweight=weight, zorder=5
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])

"""The pictures of a run: curves over its steps (curves.py), bars by stage, lines over the models M₀, M₁, ….

`run_pictures(manifest, lines)` draws what a run wrote; only pictures that have data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sdpo_kernels.stepwise.report import curves
from sdpo_kernels.stepwise.report.curves import Curves
from sdpo_kernels.stepwise.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    bars,
    canvas,
    dots,
    finite,
    memory_unit,
    model_name,
    numbers,
    percent_axis,
    picture_style,
    render,
    stage_axis,
    time_unit,
)
from sdpo_kernels.stepwise.report.svg import render_svg
from sdpo_kernels.stepwise.report.terms import captions, start_levels

Record = dict[str, Any]
Line = tuple[str, str, str]  # key of an evaluation, name, colour


@dataclass(frozen=True)
class Picture:
    """A picture of the report: `name`.png is its file, `svg` the same for the page."""

    name: str
    png: bytes
    svg: str
    caption: str


def run_pictures(manifest: Record, lines: Sequence[Record]) -> list[Picture]:
    """The pictures of a run in reading order; those without data are left out.

    manifest: a run's manifest.json; lines: the objects of its metrics.jsonl, sorted by "stage/global_step".
    """
    stages, models = manifest["stages"], scored_models(manifest)

    # an auxiliary loss is part of what is logged, so the start is not known then
    auxiliary = any("aux_loss" in line for line in lines)
    run = Curves(stages, lines, {} if auxiliary else start_levels(manifest))

    # each function returns None if the run has nothing for it yet
    with picture_style():
        figures = {
            "loss": curves.loss_picture(run),
            **curves.term_pictures(run),
            "rewards": curves.reward_picture(run),
            "reward_margin": curves.margin_picture(run),
            "reward_accuracy": curves.accuracy_picture(run),
            "logps": curves.logps_picture(run),
            "eval_accuracy": eval_accuracy_picture(models),
            "eval_gamma": eval_margin_picture(models),
            "eval_logps": eval_logps_picture(models),
            "gamma_reference": reference_margin_picture(stages),
            "grad_norm": curves.gradient_picture(run),
            "learning_rate": curves.rate_picture(run),
            "time": time_picture(stages),
            "memory": memory_picture(stages),
        }
        texts = captions(manifest, run.window, run.terms)
        return [
            Picture(name, render(figure), render_svg(figure, name, texts[name]), texts[name])
            for name, figure in figures.items()
            if figure is not None
        ]


def scored_models(manifest: Record) -> list[tuple[int, Record]]:
    """The models scored on the evaluation pairs, as (t, scores) of M_t; M_0 is the initial model."""
    scored = [(0, manifest.get("initial_eval"))]
    scored += [(stage["index"], stage.get("eval")) for stage in manifest["stages"]]
    return [(index, with_half_ties(scores)) for index, scores in scored if scores]


def with_half_ties(scores: Record) -> Record:
    """Scores whose accuracies count a tie half; the manifest counts it as wrong, and gives the share of ties."""
    halved = dict(scores)
    for key, ties in (("pair_accuracy", "pair_ties"), ("reward_accuracy", "reward_ties")):
        if finite(scores.get(key)) and finite(scores.get(ties)):
            halved[key] = scores[key] + scores[ties] / 2
    return halved


# ---- by stage ----


def reference_margin_picture(stages: Sequence[Record]) -> Figure | None:
    """The log-prob margin of each stage's reference on that stage's pairs."""
    return stage_bars(stages, "gamma_reference", "Log-prob margin of the reference", lambda top: (1.0, "nat"), BLUE)


def time_picture(stages: Sequence[Record]) -> Figure | None:
    """Wall time of each stage."""
    return stage_bars(stages, "seconds", "Time", time_unit, GREY)


def memory_picture(stages: Sequence[Record]) -> Figure | None:
    """Peak memory of each stage."""
    return stage_bars(stages, "peak_memory_bytes", "Peak memory", memory_unit, GREY)


def stage_bars(
    stages: Sequence[Record], key: str, title: str, unit_of: Callable[[float], tuple[float, str]], color: str
) -> Figure | None:
    """One bar per stage for `key` of the manifest; `unit_of` maps the largest value to (divisor, unit)."""
    known = [stage for stage in stages if finite(stage.get(key))]
    if not known:
        return None

    # values for the stages that have one, but all stages on the axis
    divisor, unit = unit_of(max(abs(stage[key]) for stage in known))
    values = [stage[key] / divisor for stage in known]
    figure, ax = canvas(title)
    if look_equal(values):
        dots(ax, [stage["index"] for stage in known], values, color)
        unit += ", axis not from 0"
    else:
        bars(ax, [stage["index"] for stage in known], values, 0.56, color)
    stage_axis(ax, [(stage["index"], stage["name"]) for stage in stages])
    ax.set_ylabel(unit)
    return figure


def look_equal(values: Sequence[float]) -> bool:
    """Whether bars from zero would hide that the values differ: by less than a twentieth of the greatest."""
    spread = max(values) - min(values)
    return 0 < spread < max(map(abs, values)) / 20


# ---- by model ----


def eval_accuracy_picture(models: Sequence[tuple[int, Record]]) -> Figure | None:
    """Pair accuracy of M₀, M₁, … on the evaluation pairs, summed and per token, and reward accuracy of M₁, ….

    The axis spans at least 8 percentage points, so that a change of 1 does not look dramatic.
    """
    series = [
        ("pair_accuracy", "pair", BLUE),
        ("pair_accuracy_per_token", "pair, per token", GREY),
        ("reward_accuracy", "reward", GREEN),
    ]
    figure = model_lines(models, series, "Accuracy on the evaluation pairs", percents, least_span=0.08)

    # no room for shares below 0 or above 1
    if figure is not None:
        low, high = figure.axes[0].get_ylim()
        figure.axes[0].set_ylim(max(low, -0.04), min(high, 1.06))
        percent_axis(figure.axes[0])
        figure.axes[0].set_ylabel("share of pairs")
    return figure


def percents(shares: Sequence[float]) -> list[str]:
    """Shares as per cent, to a tenth."""
    return [f"{share:.1%}" for share in shares]


def eval_margin_picture(models: Sequence[tuple[int, Record]]) -> Figure | None:
    """The log-prob margin of M₀, M₁, … on the evaluation pairs."""
    return in_nat(model_lines(models, [("gamma", "", BLUE)], "Log-prob margin on the evaluation pairs", numbers))


def eval_logps_picture(models: Sequence[tuple[int, Record]]) -> Figure | None:
    """Mean log-probs of chosen and rejected answers of the evaluation pairs, under M₀, M₁, …."""
    series = [("logps_chosen", "chosen", BLUE), ("logps_rejected", "rejected", ORANGE)]
    return in_nat(model_lines(models, series, "Log-probs on the evaluation pairs", numbers))


def in_nat(figure: Figure | None) -> Figure | None:
    """The figure with its unit."""
    if figure is not None:
        figure.axes[0].set_ylabel("nat")
    return figure


def model_lines(
    models: Sequence[tuple[int, Record]],
    series: Sequence[Line],
    title: str,
    write: Callable[[Sequence[float]], list[str]],
    least_span: float = 0.0,
) -> Figure | None:
    """One line per (key, name, colour) over the models; the first one also shows its values."""
    drawn = [line for line in series if any(finite(scores.get(line[0])) for _, scores in models)]
    if not drawn:
        return None

    # the first line is drawn on top
    figure, ax = canvas(title, [(name, color) for _, name, color in drawn] if len(drawn) > 1 else ())
    for place, (key, _, color) in enumerate(drawn):
        x, y = zip(*[(t, scores[key]) for t, scores in models if finite(scores.get(key))], strict=True)
        style: Record = {"linewidth": 1.8, "markersize": 6, "markeredgecolor": "white", "zorder": 3 - 0.1 * place}
        ax.plot(x, y, "o-", color=color, **style)
        if place == 0 and len(x) <= 6:
            write_values(ax, x, y, write(y))

    # widen a short y axis to `least_span`, around its middle
    ax.set_xlim(models[0][0] - 0.35, models[-1][0] + 0.35)
    ax.margins(y=0.22)
    low, high = ax.get_ylim()
    slack = max(0.0, least_span - (high - low)) / 2
    ax.set_ylim(low - slack, high + slack)

    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: model_name(round(value))))
    ax.set_xlabel("model")
    return figure


def write_values(ax: Axes, x: Sequence[int], y: Sequence[float], texts: Sequence[str]) -> None:
    """Write each value above its point."""
    for place, value, text in zip(x, y, texts, strict=True):
        weight = "bold" if place == x[-1] else "normal"
        ax.annotate(text, (place, value), (0, 8), textcoords="offset points", ha="center", fontweight=weight, zorder=5)

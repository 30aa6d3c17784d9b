"""What `page.py` and `pictures.py` show of `benchmarks.stages --betas`: tables, and accuracy against distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.betas_statistics import accuracy

Report = dict[str, Any]
Markers = dict[str, tuple[str, str]]
# colour and marker of each method; DPO, which the others are compared with, is black
DRAWN: Markers = {
    "dpo": ("#222222", "o"), "sdpo": ("#cc6677", "s"), "reversed": ("#ddaa33", "v"), "random": ("#999933", "^"),
    "initial": ("#4477aa", "x"), "ema": ("#117733", "D"), "guiding": ("#aa4499", "P"),
}  # fmt: skip


def section(report: Report) -> list[str]:
    """Tables of each task: the cells; differences from DPO at the same β, at a third of it, and at equal distance."""
    parts = [
        "Each cell: mean over seeds of accuracy (%) / KL from M₀ (nat a token). Differences in points of accuracy, "
        "paired by seed, with 95 % intervals; behind them the ratio of the KL. What is compared how, and what was "
        "expected: [notes](../benchmarks/results/notes.md)."
    ]
    for found in report["results"]:
        task = report["tasks"][found["task"]]
        cells = {(cell["method"], cell["beta"]): cell for cell in found["cells"]}
        initial = next(cell for (method, _), cell in cells.items() if method == "initial_model")
        seeds = ", ".join(map(str, found["seeds"]))
        parts.append(
            f"**{found['task']}**: learning rate {task['learning_rate']:g}, batches of {task['batch']} pairs, seeds "
            f"{seeds}; accuracy of M₀: {shown(initial['accuracy'])} %."
        )

        betas = task["betas"]
        lines = [[f"`{name}`", *(of_cell(cells[name, beta]) for beta in betas)] for name in methods_of(found)]
        parts.append(table(["method", *(f"β {beta:g}" for beta in betas)], lines))
        parts.append(
            table(
                ["minus `dpo` at the same β", *(f"β {beta:g}" for beta in betas)], compared(found["same_beta"], betas)
            )
        )
        some = betas[1:]
        headings = [f"β {beta:g} against {beta / 3:g}" for beta in some]
        parts.append(table(["minus `dpo` at β/3", *headings], compared(found["divided_beta"], some)))
        parts.append(table(["minus `dpo`", "at equal distance", "each at its best β"], list(overall(found))))
        parts += order(found)
    return parts


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines))


def of_cell(cell: Report) -> str:
    """Accuracy / KL."""
    return f"{100 * cell['accuracy']['mean']:.1f} / {cell['kl']['mean']:.3f}"


def compared(methods: Report, betas: Sequence[float]) -> list[list[str]]:
    """A line a method: the difference at each β, and the ratio of the KL."""
    lines = []
    for method, of in methods.items():
        by_beta = {difference["beta"]: difference for difference in of}
        found = [by_beta[beta] for beta in betas]
        cells = [f"{shown(d['accuracy'], '+')}; KL × {math.exp(d['log_kl']['mean']):.2f}" for d in found]
        lines.append([f"`{method}`", *cells])
    return lines


def overall(found: Report) -> Iterator[list[str]]:
    """A line a method: at equal distance, and at the best β."""
    for method, best in found["best_beta"].items():
        yield [f"`{method}`", shown(found["same_distance"][method], "+"), shown(best, "+")]


def order(found: Report) -> list[str]:
    """The orders of the stages against sDPO's own, at equal distance."""
    texts = [f"`{name}` {shown(of['same_distance'], '+')}" for name, of in found["order"].items()]
    return [f"At equal distance, minus `sdpo` (points): {'; '.join(texts)}."] if texts else []


def shown(value: Report | None, sign: str = "") -> str:
    """mean (low … high), in per cent; a dash where the distances do not overlap."""
    if value is None:
        return "–"
    mean, low, high = (f"{100 * value[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} … {high})"


def picture(report: Report, pyplot: Any) -> Any:
    """A column a task: above, accuracy against KL, a line a method; below, paired differences from DPO."""
    results = report["results"]
    figure, grid = pyplot.subplots(
        2, len(results), figsize=(4 * len(results), 6.8), squeeze=False, layout="constrained", height_ratios=(3, 2)
    )
    for above, below, found in zip(*grid, results, strict=True):
        draw_curves(above, found, [row for row in report["rows"] if row["task"] == found["task"]])
        draw_differences(below, found)
        above.set_title(found["task"])
    grid[0][0].set_ylabel("accuracy (%): mean, and each seed")
    grid[0][0].legend(fontsize=8, frameon=False)
    grid[1][0].legend(fontsize=8, frameon=False)
    return figure


def draw_curves(axes: Any, found: Report, rows: Sequence[Report]) -> None:
    """A line a method through the means of its β; small dots are seeds, which differ more than methods do."""
    from matplotlib.ticker import LogLocator

    initial = next(cell for cell in found["cells"] if cell["method"] == "initial_model")
    axes.axhline(100 * initial["accuracy"]["mean"], color="#999999", linewidth=0.8, linestyle=":", label="M₀")
    for method in methods_of(found):
        colour, marker = DRAWN[method]
        of = sorted((c for c in found["cells"] if c["method"] == method), key=lambda cell: cell["kl"]["mean"])
        means = [[cell["kl"]["mean"] for cell in of], [100 * cell["accuracy"]["mean"] for cell in of]]
        axes.plot(*means, color=colour, marker=marker, ms=5, lw=1.2, label=method)
        seeds = [row for row in rows if row["method"] == method]
        axes.scatter([row["kl"] for row in seeds], [100 * accuracy(row) for row in seeds], s=6, color=colour, alpha=0.5)
    # a range of less than a decade has too few ticks, or too many, by default
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("KL from M₀ (nat a token)")
    axes.grid(linewidth=0.4, alpha=0.6)


def draw_differences(axes: Any, found: Report) -> None:
    """Two dots a method with their intervals: at equal distance, where distances overlap, and each at its best β."""
    methods = list(found["best_beta"])[::-1]
    for place, method in enumerate(methods):
        for key, height, face in (("same_distance", 0.15, DRAWN[method][0]), ("best_beta", -0.15, "white")):
            if (value := found[key][method]) is None:
                continue
            reach, mean = 100 * (value["high"] - value["mean"]), 100 * value["mean"]
            axes.errorbar(mean, place + height, xerr=reach, color=DRAWN[method][0], fmt="o", ms=5, mfc=face, capsize=2)

    # two empty series for the legend
    axes.scatter([], [], color="#222222", label="at equal KL")
    axes.scatter([], [], facecolor="white", edgecolor="#222222", label="each at its best β")
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.set_xlabel("points over DPO, 95 % interval over seeds")
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)


def methods_of(found: Report) -> list[str]:
    """The methods that a task has cells of."""
    return [name for name in DRAWN if any(cell["method"] == name for cell in found["cells"])]

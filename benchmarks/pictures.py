"""Pictures for the page of results (`page.py`); the same report always gives the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import betas_page, grad_tol_training_page, mismatch_page
from benchmarks.names import name
from benchmarks.records import FLOORS

Report = dict[str, Any]
OURS, OTHERS, FLOOR = "#cc6677", "#4477aa", "#999999"


def draw(report: Report, path: Path) -> None:
    """Write the report's picture to `path`, if its kind has one."""
    if report["benchmark"] not in DRAWN:
        return

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = DRAWN[report["benchmark"]](report, pyplot)
    # without the version of matplotlib, so that the file changes only with the results
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def colour(case: str) -> str:
    """The colour of our cases, of the floor (the bare-GEMM baseline), or of a peer."""
    return OURS if case.startswith("ours") else FLOOR if case.startswith("gemms") else OTHERS


def head(report: Report, pyplot: Any) -> Any:
    """Bars of time and extra memory with their values, the fastest first, and a line at the bare-GEMM baseline."""
    # bars are drawn from the bottom up
    found = sorted((r for r in report["results"] if "skipped" not in r), key=lambda r: -r["median_s"])
    figure, both = pyplot.subplots(1, 2, figsize=(9.6, 0.3 * len(found) + 1.2), sharey=True, layout="constrained")
    floors = [result for result in found if result["case"] in FLOORS]
    floor = min(floors, key=lambda result: result["median_s"], default=None)

    # at least 1 MiB: a logarithmic axis has no place for 0
    measures = {
        "milliseconds a step, median (log)": [1e3 * result["median_s"] for result in found],
        "extra memory, MiB (log)": [max(result["peak_extra_bytes"] or 0, 2**20) / 2**20 for result in found],
    }
    names, colours = [name(result["case"]) for result in found], [colour(result["case"]) for result in found]

    for axes, (label, values) in zip(both, measures.items(), strict=True):
        bars = axes.barh(names, values, color=colours, height=0.7)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        if floor is not None:
            axes.axvline(values[found.index(floor)], color="#222222", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")  # these labels overlap, and the bars have their values
        axes.margins(x=0.15)  # room for the values
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    if floor is not None:
        figure.suptitle("line: the four matrix products of a step and nothing else", fontsize=9)
    return figure


def accuracy(report: Report, pyplot: Any) -> Any:
    """Dots at the error in nats of each case, one panel per input."""
    found = [result for result in report["results"] if "skipped" not in result]
    inputs = list(dict.fromkeys(result["input"] for result in found))
    cases = list(dict.fromkeys(result["case"] for result in found))[::-1]
    names = [name(case) for case in cases]
    figure, panels = pyplot.subplots(
        1, len(inputs), figsize=(3.2 * len(inputs) + 1, 0.3 * len(cases) + 1.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip

    # one marker per dtype and vocabulary
    problems = list(dict.fromkeys((result["dtype"], result["vocab"]) for result in found))
    for axes, kind in zip(panels[0], inputs, strict=True):
        for marker, problem in zip("os^vDP*X", problems, strict=False):
            of = [r for r in found if r["input"] == kind and (r["dtype"], r["vocab"]) == problem]
            places = [cases.index(r["case"]) for r in of]
            values = [max(r["nats"], 1e-12) for r in of]
            axes.scatter(values, places, marker=marker, s=18, c=[colour(r["case"]) for r in of])
            # an empty series with a neutral colour for the legend
            axes.scatter([], [], marker=marker, c="#222222", s=18, label=f"{problem[0]}, V {problem[1]}")

        axes.set_yticks(range(len(cases)), names)
        axes.set_xscale("log")
        axes.set_xlabel(f"{kind}: error (nat)")
        axes.grid(axis="x", linewidth=0.4, alpha=0.6)

    panels[0][-1].legend(fontsize=7, frameon=False)
    return figure


def scaling(report: Report, pyplot: Any) -> Any:
    """Curves of time in the upper row and of extra memory in the lower one, one column per factor."""
    factors = list(dict.fromkeys(point["factor"] for point in report["results"]))
    cases = [result["case"] for result in report["results"][0]["results"]]
    figure, grid = pyplot.subplots(
        2, len(factors), figsize=(2.6 * len(factors) + 1.6, 5), squeeze=False, layout="constrained", sharex="col"
    )

    for column, factor in enumerate(factors):
        points = [point for point in report["results"] if point["factor"] == factor]
        for case in cases:
            found = [(p["value"], r) for p in points for r in p["results"] if r["case"] == case and "skipped" not in r]
            values = [value for value, _ in found]
            width = 2 if case == "ours" else 1
            grid[0][column].plot(
                values, [1e3 * r["median_s"] for _, r in found], "o-", ms=3, lw=width, label=name(case)
            )
            # at least 1 MiB, as in `head`
            memory = [max(r["peak_extra_bytes"] or 0, 2**20) / 2**20 for _, r in found]
            grid[1][column].plot(values, memory, "o-", ms=3, lw=width)

        for row, label in enumerate(("median ms", "extra MiB")):
            grid[row][column].set_xscale("log", base=2)
            grid[row][column].set_yscale("log")
            grid[row][0].set_ylabel(label)
        grid[1][column].set_xlabel(factor)

    grid[0][0].legend(fontsize=7, frameon=False)
    return figure


DRAWN: dict[str, Callable[[Report, Any], Any]] = {
    "head": head,
    "accuracy": accuracy,
    "mismatch": mismatch_page.picture,
    "grad_tol_training": grad_tol_training_page.picture,
    "scaling": scaling,
    "betas": betas_page.picture,
}

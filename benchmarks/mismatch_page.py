"""What `page.py` and `pictures.py` show of `benchmarks.mismatch`: tables by peak, and the errors against it."""

from __future__ import annotations

from typing import Any

from benchmarks.mismatch_cases import ABOUT, point_of

Report = dict[str, Any]
ERRORS = {
    "nats": "largest error of a token's log-prob (nat)",
    "of_peak": "the same ÷ peak",
    "probability": "mean error of a probability (1 = all of it)",
    "dx": "error of dX, relative",
    "dw": "error of dW, relative",
}
BITS = ("repeated", "order", "batch", "stash", "threads")
GOAL = 1e-6  # of the peak


def section(report: Report) -> list[str]:
    """A table for each error, by case and peak; then what leaves a log-prob's bits alone."""
    ran = [result for result in report["results"] if "skipped" not in result]
    skipped = {result["case"]: result["skipped"] for result in report["results"] if "skipped" in result}
    cases = list(dict.fromkeys(result["case"] for result in ran))
    points = list(dict.fromkeys(map(point_of, ran)))
    of = {(result["case"], point_of(result)): result for result in ran}

    shape = ", ".join(f"{name} {value}" for name, value in report["shape"].items())
    parts = [
        f"Shape: {shape}. Each row of the batch is one token, drawn from its own softmax; the peak is a row's largest "
        "logit, on average. bf16 operands, except that naive fp32 gets the same numbers in float32. A model's name "
        "stands for hidden states and head of that model on real pairs. Truth: float64 on the same numbers. Gradients "
        "of bf16 operands are stored in bf16, which alone is an error of 1e-3 to 2e-3."
    ]
    for key, title in ERRORS.items():
        lines = [
            [f"{case} ({ABOUT[case]})", *(f"{of[case, p][key]:.1e}" if (case, p) in of else "–" for p in points)]
            for case in cases
        ]
        parts.append(table([title, *(f"peak {point}" for point in points)], lines))

    every = {case: [of[case, p] for p in points if (case, p) in of] for case in cases}
    lines = [[case, *(held(every[case], change) for change in BITS)] for case in cases]
    headings = ["same bits of the log-probs", "again", "other order", "half the batch", "no stash", "one thread"]
    parts.append(table(headings, lines))
    if skipped:
        parts.append("Not run:\n\n" + "\n".join(f"- {case}: {why}" for case, why in skipped.items()))
    return parts


def held(results: list[Report], change: str) -> str:
    """At how many of the points the change left every bit alone; no stash concerns ours alone."""
    if change == "stash" and results[0]["case"] != "ours":
        return "–"
    count = sum(change in result["same_bits"] for result in results)
    return "yes" if count == len(results) else "no" if not count else f"{count} of {len(results)}"


def table(headings: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines))


PANELS = {
    "of_peak": "largest error of a log-prob ÷ peak",
    "probability": "mean error of a probability",
    "dx": "error of dX, relative",
}


def picture(report: Report, pyplot: Any) -> Any:
    """Three panels over the peak; cases whose values are the same to 2 % share a line."""
    found = [result for result in report["results"] if "skipped" not in result and "real" not in result]
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 4.8), layout="constrained")
    lines = together(found)

    for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
        for number, (cases, results) in enumerate(lines.items()):
            ours = cases[0] == "ours"
            axes.plot(
                [result["peak"] for result in results],
                [max(result[key], 1e-9) for result in results],
                "o-" if ours else "o--",
                ms=4,
                lw=2 if ours else 1,
                color="#cc6677" if ours else pyplot.get_cmap("tab10").colors[number],
                label="\n".join(cases),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.set_xlabel("largest logit of a row, on average")
        axes.set_title(label, fontsize=10)
        axes.grid(linewidth=0.4, alpha=0.6)

    panels[0].axhline(GOAL, color="#222222", linewidth=0.8, linestyle=":")
    panels[0].annotate("goal", (5, GOAL), fontsize=8, va="bottom")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=len(labels))
    return figure


def together(found: list[Report]) -> dict[tuple[str, ...], list[Report]]:
    """The results by cases that have the same ones, in the order of their first."""
    lines: list[tuple[list[str], list[Report]]] = []
    for case in dict.fromkeys(result["case"] for result in found):
        of = [result for result in found if result["case"] == case]
        for cases, results in lines:
            if len(of) == len(results) and all(
                abs(mine[key] - other[key]) <= 0.02 * other[key]
                for mine, other in zip(of, results, strict=True)
                for key in PANELS
            ):
                cases.append(case)
                break
        else:
            lines.append(([case], of))
    return {tuple(cases): results for cases, results in lines}

"""What `page.py` shows of `benchmarks.grad_tol`: a summary of all reports, then tables of each."""

from __future__ import annotations

from typing import Any

from benchmarks.mismatch_page import table
from benchmarks.real import FILES

Report = dict[str, Any]


def summary(reports: list[Report]) -> list[str]:
    """One line for each model and tolerance: what is kept, what it saves, what it costs."""
    lines = []
    for report in sorted(reports, key=lambda report: str(report["model"])):
        for one in report["tolerances"]:
            of = [case for case in report["cases"] if settings(case) == settings(one)]
            trained, frozen = ([case for case in of if case["frozen"] == is_frozen] for is_frozen in (False, True))
            worst = f"{100 * one['dx_rows']['worst']:.0f} %" if "dx_rows" in one else "–"  # older reports have none
            cells = [report["model"], of[0]["name"].split(",")[0], f"{100 * one['kept']:.0f} %"]
            lines.append([*cells, between(trained), between(frozen), f"{100 * one['dx_error']:.1f} %", worst])
    headings = ["rows of", "grad_tol", "kept", "step ÷ exact step", "with a frozen head", "dX error", "worst row of dX"]
    files = ", ".join(f"`{name}`" for name in FILES)
    return [
        "In short, over all reports below. A step is forward and backward of the head alone; several figures are of "
        "several stashes. kept: of pairs of a row and a tile of 64 columns. Errors are relative to the exact gradient. "
        "A row that the model is sure of has a small gradient, of which an absolute tolerance may keep the target's "
        "tile alone: the row may then be off by more than its size.",
        table(headings, lines),
        f"The rows of a model are those of answers of real pairs, the first of {files} (`python -m benchmarks.real`); "
        "random ones keep everything, as no language model's do: the worst case.",
    ]


def section(report: Report) -> list[str]:
    """What is kept and how far gradients are off; then each case's time beside the exact step's and bare GEMMs."""
    chosen, of_rows = [], report["tolerances"][0].get("dx_rows", {})
    for one in report["tolerances"]:
        errors = [one["dx_error"], one["dw_error"], *(one["dx_rows"][name] for name in of_rows)]
        chosen.append([tolerance(one), f"{100 * one['kept']:.0f} %", *(f"{error:.1e}" for error in errors)])
    lines = []
    for case in report["cases"]:
        least, largest = case["spread_s"]
        ratios = [case["step_to_gemms"], case["step_to_exact"], case["backward_to_exact"]]
        cells = [case["name"], f"{1e3 * case['step_s']:.0f}", f"{1e3 * least:.0f} … {1e3 * largest:.0f}"]
        lines.append([*cells, *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])

    about = ", ".join(f"{key} {report[key]}" for key in ("model", "rows", "hidden", "vocab"))
    headings = ["case", "median ms", "min … max", "step ÷ bare GEMMs", "step ÷ exact", "backward ÷ exact"]
    return [
        f"Hidden states, head and targets: {about}. CPU seconds of one thread; bare GEMMs: the four products in "
        "float32. With a frozen head the exact forward makes the gradient, so its backward is not compared.",
        table(["grad_tol", "kept", "dX error", "dW error", *(f"a row of dX: {name}" for name in of_rows)], chosen),
        table(headings, lines),
    ]


def settings(one: dict[str, Any]) -> tuple[float, bool]:
    """The tolerance of a case, and whether it is relative."""
    return one["grad_tol"], one.get("relative", False)


def tolerance(one: dict[str, Any]) -> str:
    """The bound, as the page shows it."""
    return f"{one['grad_tol']:g}" + " · (1 − p)" * one.get("relative", False)


def between(cases: list[dict[str, Any]]) -> str:
    """The least and the largest of the steps' ratios to exact ones."""
    ratios = [case["step_to_exact"] for case in cases]
    return " … ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))) if ratios else "–"

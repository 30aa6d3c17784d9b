"""The table of `make trainers` in docs/integrations.md, between two marks; never typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

PAGE = ROOT / "docs/integrations.md"
START, END = "<!-- python -m benchmarks.trainers --page -->", "<!-- end of the table -->"


def write(report: dict[str, Any], page: Path = PAGE) -> None:
    """Put the report's table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{page}: must contain {START!r} and {END!r}")
    page.write_text(before + START + "\n" + table(report) + END + after, encoding="utf-8")


def table(report: dict[str, Any]) -> str:
    """The table in Markdown, and where it comes from."""
    lines = ["", "| trainer | way | s a step | MB | losses differ by |", "|---|---|---:|---:|---:|"]
    for result in report["results"].values():
        trainer = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        for way, found in result["ways"].items():
            cells = [trainer, way, *_cells(found)]
            lines.append("| " + " | ".join(cells) + " |")
            trainer = ""

    machine = report["machine"]
    source = (
        f"`{report['command']}`, {machine['processor']}, {machine['threads']} thread, commit {report['commit']}, "
        f"{report['date'][:10]}."
    )
    return "\n".join([*lines, "", source, "", ""])


def line(name: str, way: str, found: dict[str, Any]) -> str:
    """One way for the terminal."""
    seconds, memory, deviation = _cells(found)
    return f"{name:14} {way:10} {seconds:>8} s/step  {memory:>6} MB  losses differ by {deviation}"


def _cells(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return ["failed", "–", "–"]
    memory = f"{found['peak_extra_bytes'] / 1e6:.0f}"
    return [f"{found['median_s']:.2f}", memory, f"{found.get('deviation', 0.0):.1e}"]

"""The parts of pages that are generated from code: `python -m docs.site` writes them, a test compares them.

A page has each part between two lines, which say what it is made of:

    <!-- python -m docs.site: RunConfig model dtype -->
    …
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from docs.site import losses, report, settings
from docs.site.stage import ROOT

PAGES = {
    ROOT / "docs/settings.md": settings.part,
    ROOT / "docs/methods/losses.md": losses.part,
    ROOT / "docs/report.md": report.part,
}
_PART = re.compile(r"(<!-- python -m docs\.site: ([^\n]*) -->\n).*?(<!-- end -->)", re.S)


def parts(path: Path) -> list[Sequence[str]]:
    """The words between the marks of a page's parts."""
    return [found[2].split() for found in _PART.finditer(path.read_text(encoding="utf-8"))]


def regenerated(path: Path) -> str:
    """The page with its generated parts as they should be."""

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n{PAGES[path](found[2].split()).strip()}\n\n{found[3]}"

    return _PART.sub(made, path.read_text(encoding="utf-8"))


def main() -> None:
    """Rewrite all pages."""
    for path in PAGES:
        path.write_text(regenerated(path), encoding="utf-8")

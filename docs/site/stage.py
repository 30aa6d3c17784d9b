"""Copies the pages to build/docs, where the site is built from: `python -m docs.site.stage`.

CONTRIBUTING.md and CHANGELOG.md become pages, too. A link to any other file of the repository that is not in docs/
turns into a link to the repository's address. In docs/ itself all links stay relative, as GitHub and editors follow
them.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGED = ROOT / "build/docs"
FROM_OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def pages() -> dict[str, Path]:
    """The pages of the site, by their place in it."""
    found = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
    return found | {name: ROOT / name for name in FROM_OUTSIDE}


def stage(folder: Path = STAGED) -> None:
    """Write pages and pictures to `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    for place, path in pages().items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(
            with_links_of_the_site(path.read_text(encoding="utf-8"), path, place), encoding="utf-8"
        )
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy2(picture, folder)


def with_links_of_the_site(text: str, path: Path, place: str) -> str:
    """The text of the page at `path`, for its place in the site."""

    def target(link: str) -> str:
        to = Path(os.path.normpath(path.parent / link))
        if "://" in link or not to.exists():
            return link  # the build reports what is not there
        name = to.relative_to(ROOT).as_posix()
        if name in FROM_OUTSIDE or (to.is_file() and name.startswith("docs/")):
            return os.path.relpath(name.removeprefix("docs/"), Path(place).parent)
        return f"{repository()}/{'tree' if to.is_dir() else 'blob'}/main/{name}"

    return _LINK.sub(lambda link: link[1] + target(link[2]) + link[3], text)


def repository() -> str:
    """The repository's address, which setup.py has."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REPOSITORY":
            return ast.literal_eval(node.value)
    raise LookupError("setup.py: has no REPOSITORY")


if __name__ == "__main__":
    stage()

"""docs/extending: every step of every page is applied to a copy of the repository, and its commands run there.

A page is a list of steps, told apart by the line before a block of code:

    New file `path`:                the block becomes the file
    At the end of `path`:           the block is appended
    In `path`…:                     a diff; its old lines are in the file exactly once
    anything else                   a python block runs as a program, the lines of a sh block as commands
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs/extending").glob("*.md"))
COPIED = ["sdpo_kernels", "csrc", "tests", "docs", "CHANGELOG.md", "README.md", "pyproject.toml"]
HEADING = r"(?:^(?P<verb>New file|At the end of|In) `(?P<path>[^`]+)`[^\n]*:\n\n)?"
BLOCK = re.compile(HEADING + r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


class Step(NamedTuple):
    """A block of a page, and the file that it is about."""

    verb: str | None
    path: str | None
    language: str
    text: str


def steps_of(page: str) -> list[Step]:
    """The blocks of a page; a diff without a line of its own before it is about the same file as the one before."""
    steps: list[Step] = []
    for found in BLOCK.finditer(page):
        step = Step(**found.groupdict())
        if step.language == "diff" and step.path is None:
            step = step._replace(verb="In", path=steps[-1].path)
        steps.append(step)
    return steps


def apply_diff(old: str, diff: str) -> str:
    """`old` with the lines of `diff` that begin with − replaced by those that begin with +; the others are context."""
    lines = [line or " " for line in diff.splitlines()]
    assert all(line[0] in " +-" for line in lines), diff
    before = "".join(line[1:] + "\n" for line in lines if line[0] != "+")
    after = "".join(line[1:] + "\n" for line in lines if line[0] != "-")
    assert old.count(before) == 1, f"found {old.count(before)} times, must be there once:\n{before}"
    return old.replace(before, after)


def run(program: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(program)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def take(step: Step, folder: Path) -> None:
    """Do in `folder` what the page says."""
    if step.path is not None:
        path = folder / step.path
        assert (step.verb, step.language) in {("New file", "python"), ("At the end of", "python"), ("In", "diff")}
        assert path.exists() == (step.verb != "New file"), step.path
        old = "" if step.verb == "New file" else path.read_text(encoding="utf-8")
        new = apply_diff(old, step.text) if step.verb == "In" else f"{old}\n\n{step.text}".lstrip("\n")
        path.write_text(new, encoding="utf-8")
    elif step.language == "sh":
        for line in step.text.splitlines():
            python, *arguments = shlex.split(line)
            assert python == "python", line
            run([sys.executable, *arguments, "-p", "no:cacheprovider"], folder)
    elif step.language == "python":
        run([sys.executable, "-c", step.text], folder)


def check_style(paths: list[str], folder: Path) -> None:
    """What the page adds passes ruff, as `make lint` runs it."""
    ruff = Path(sys.executable).parent / "ruff"
    assert ruff.exists(), "ruff is part of the extra `dev`"
    for options in (["check"], ["format", "--check"]):
        run([str(ruff), *options, *sorted(set(paths))], folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_what_it_says(page, tmp_path):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    text = page.read_text(encoding="utf-8")
    steps = steps_of(text)
    assert {step.verb for step in steps} >= {"In", None}
    for step in steps:
        take(step, tmp_path)
    check_style([step.path for step in steps if step.path is not None and step.path.endswith(".py")], tmp_path)


def test_there_is_a_page_for_each_kind():
    assert [page.stem for page in PAGES] == ["add_a_backend", "add_a_loss", "add_a_model_family", "add_a_source"]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"docs/extending/{page.name}" in contributing for page in PAGES)


def test_a_diff_that_does_not_fit_is_an_error():
    assert apply_diff("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    for old in ("a\nc\n", "a\nb\na\nb\n"):
        with pytest.raises(AssertionError, match="must be there once"):
            apply_diff(old, " a\n-b\n+d\n")

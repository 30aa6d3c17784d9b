"""The pages of the documentation as tests read them: blocks of code, and lines that are commands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
_COMMANDS = ("sdpo", "torchrun", "accelerate", "python", "make", "pip")


def pages() -> list[Path]:
    """All pages of docs/, and those beside them."""
    return [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def text_of(name: str) -> str:
    """The text of a page of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [textwrap.dedent(block) for kind, block in _FENCE.findall(text) if kind == language]


def commands(text: str) -> list[str]:
    """The indented lines that begin with a command, without their comments and variables."""
    unfenced = _FENCE.sub("", text)
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in unfenced.splitlines() if line.startswith("    ")]
    lines = [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in lines]
    return [line for line in lines if line.split(" ")[0] in _COMMANDS]

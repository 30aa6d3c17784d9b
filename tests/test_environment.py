"""Every environment variable that the code reads is on the settings page, and the other way round."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_environment_variables_are_documented():
    read = set()
    for path in [ROOT / "setup.py", *(ROOT / "sdpo_kernels").rglob("*.py")]:
        read |= set(re.findall(r"\"(SDPO_[A-Z_]+)\"", path.read_text(encoding="utf-8")))
    page = set(re.findall(r"^\| `(SDPO_[A-Z_]+)`", (ROOT / "docs/settings.md").read_text(encoding="utf-8"), re.M))
    assert page == read

"""Run a file of tests in Triton's interpreter: in a process of its own, since Triton reads its setting at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def check_in_interpreter(name: str, chosen: str = "") -> None:
    """The tests of tests/backends/`name` that `-k chosen` selects, or all, pass, and there are some."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER / name)],
        cwd=FOLDER.parents[1], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

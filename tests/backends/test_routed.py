"""`grad_tol` with the Triton backend, as far as it can be tested without a GPU: its kernels in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("routed_interpreted.py")
PARTS = ("are_kept", "bound or exact", "chunks or columns or tile or bits")


@pytest.mark.parametrize("part", [*PARTS, "rest"])
def test_in_the_interpreter(part):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""
    chosen = " and ".join(f"not ({part})" for part in PARTS) if part == "rest" else part
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(FILE), "-k", chosen],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

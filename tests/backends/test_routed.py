"""`grad_tol` with the Triton backend, as far as it can be tested without a GPU: its kernels in the interpreter."""

from __future__ import annotations

import pytest

from tests.backends.in_interpreter import check_in_interpreter

pytest.importorskip("triton")
PARTS = ("are_kept", "bound or exact", "chunks or columns or tile or bits")


@pytest.mark.parametrize("part", [*PARTS, "rest"])
def test_in_the_interpreter(part):
    chosen = " and ".join(f"not ({part})" for part in PARTS) if part == "rest" else part
    check_in_interpreter("routed_interpreted.py", chosen)

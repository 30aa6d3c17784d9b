"""`grad_tol` with the Triton backend, as far as it can be tested without a GPU: its kernels in the interpreter."""

from __future__ import annotations

import pytest

from tests.backends.in_interpreter import check_in_interpreter

pytest.importorskip("triton")
PART = "kept or chunks or columns or bits"  # about half of the time


@pytest.mark.parametrize("chosen", [PART, f"not ({PART})"], ids=["some", "the others"])
def test_in_the_interpreter(chosen):
    check_in_interpreter("routed_interpreted.py", chosen)

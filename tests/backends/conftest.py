"""Shared by the tests of the backends."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels.backends import BACKENDS


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that leaves tiles out under `grad_tol`; tests that are parametrized by `backend` have their own."""
    chosen = BACKENDS[request.param]
    if request.param == "native" and chosen.unavailable_reason is not None:
        pytest.skip(chosen.unavailable_reason)
    assert chosen.uses_grad_tol(torch.device("cpu"))
    return request.param

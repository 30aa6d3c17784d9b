"""The backend under test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sdpo_kernels import backends
from tests.cuda import common


@pytest.fixture(params=common.NAMES.split(","))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "auto" uses this backend alone; the test fails if the backend did nothing."""
    name = request.param
    reason = backends.BACKENDS[name].supports_pairs(torch.device(common.DEVICE)) if name != "eager" else None
    if reason is not None and common.ON_CUDA:
        pytest.fail(f"{name}: {reason}")
    if reason is not None:
        pytest.skip(reason)

    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    monkeypatch.setattr(backends, "AUTO_ORDER", (name,))
    monkeypatch.setattr(backends, "NOT_AUTO", set())
    # Triton's interpreter (TRITON_INTERPRET=1, SDPO_TEST_BACKENDS=triton) takes CPU tensors
    monkeypatch.setattr(backends.BACKENDS[name], "device_types", None)
    for method in ("forward", "slice_forward", "pair_epilogue", "logits_forward"):
        monkeypatch.setattr(backends.BACKENDS[name], method, noted(name, method), raising=False)
    common.served.clear()
    yield name
    assert common.served, f"{name} served nothing"


def noted(name, method):
    """The backend's method, which notes that it was called."""
    own = getattr(backends.BACKENDS[name], method)

    def call(*args, **kwargs):
        common.served.append(method)
        return own(*args, **kwargs)

    return call

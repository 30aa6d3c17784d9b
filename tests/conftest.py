"""Shared by all tests: thread count, hypothesis profiles and the folder of real data."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sdpo_kernels import backends

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# torch is slow at its first call and machines are noisy: no deadline. HYPOTHESIS_PROFILE=search draws new examples.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers begin with the long tests: at the end, neither waits long for the other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _thawed_at_the_end() -> Iterator[None]:
    """Libraries complain at exit of objects that were not collected."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """What is imported so far stays: a run collects garbage eight times, most of its time if that is scanned."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real preference data next to the checkout, `../shared/data`."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    return DATA


@pytest.fixture(scope="module", params=["eager", "native"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the module's tests once per backend: "auto" takes it alone, and raises for what it cannot serve."""
    if request.param == "native" and (reason := backends.BACKENDS["native"].unavailable_reason) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SDPO_BACKEND", raising=False)
        patch.setattr(backends, "AUTO_ORDER", (request.param,))
        yield request.param

"""Fixtures of the driver's tests: one tiny model a session, one thread, no pictures unless a test asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from sdpo_kernels.stepwise import run as run_module
from tests.stepwise import runs


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Runs are compared bit for bit with those of children, which have one thread."""
    torch.set_num_threads(1)
    disable_progress_bar()  # `main` does so only if transformers is not imported yet


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes as long as a tiny stage; tests of the report use the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(run_module, "write_report", lambda folder: [])


@pytest.fixture
def pictures() -> None:
    """Write real reports in this test."""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random Llama with its tokenizer; never written to."""
    return runs.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def spoken(tmp_path) -> runs.Spoken:
    """A reporter whose output can be read."""
    return runs.Spoken(tmp_path)

"""What the driver's tests share: one tiny model a session, one thread, no pictures unless a test asks for them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from sdpo_kernels.stepwise import run as run_module
from tests.stepwise import runs


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Runs are compared bit for bit with those of children, which have one thread; imports are kept out of every gc."""
    torch.set_num_threads(1)
    disable_progress_bar()  # transformers' own, which `main` switches off where it is the first to import it
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes as long as a tiny stage; tests that look at the report take the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(run_module, "write_report", lambda folder: [])


@pytest.fixture
def pictures() -> None:
    """Ask for real reports."""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random Llama with its tokenizer; never written to."""
    return runs.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def spoken(tmp_path) -> runs.Spoken:
    """A reporter whose words can be read."""
    return runs.Spoken(tmp_path)

"""The Triton backend, as far as it can be tested without a GPU: its selection, and its kernels in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdpo_kernels import backends
from sdpo_kernels.backends.base import EXTRAS, Request
from sdpo_kernels.head import Head

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("triton_interpreted.py")


def request_of(**changes) -> Request:
    """A request that the backend serves, with `changes`."""
    values = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "head": Head()}
    return Request(**{**values, "outputs": EXTRAS, **changes})


def test_auto_takes_it_on_cuda(monkeypatch):
    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    assert backends.choose_backend("auto", request_of()).name == "triton"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "it runs on CUDA, not on cpu"),
        ({"dtype": torch.float16}, "it takes float32 and bfloat16, not float16"),
        ({"weight_dtype": torch.float64}, "it takes float32 and bfloat16, not float64"),
    ],
)
def test_unsupported_requests_give_the_reason(monkeypatch, changes, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backends.BACKENDS["triton"].supports(request_of(**changes)) == reason


PART = "gradients or one_launch or pieces"  # about half of the time


@pytest.mark.parametrize("chosen", [PART, f"not ({PART})"], ids=["some", "the others"])
def test_in_the_interpreter(chosen):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(FILE), "-k", chosen],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

"""The Triton backend, as far as it can be tested without a GPU: its selection, and its kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import backends
from sdpo_kernels.backends.base import EXTRAS, Request
from sdpo_kernels.head import Head
from tests.backends.in_interpreter import check_in_interpreter

pytest.importorskip("triton")


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
    check_in_interpreter("triton_interpreted.py", chosen)

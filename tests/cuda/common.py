"""Device, backends, problems and the float64 truth of the tests in this folder.

They run on CUDA where there is a device, else on the CPU, so that at least their Python is tried everywhere.
SDPO_TEST_DEVICE names the device (its absence is then a failure), SDPO_TEST_BACKENDS the backends, joined by commas:
benchmarks/gpu.sh runs one process a backend, since an illegal access makes a process's CUDA context unusable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_kernels import backends
from sdpo_kernels.backends.base import Request
from sdpo_kernels.head import Head

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("SDPO_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
ON_CUDA = DEVICE == "cuda"
NAMES = os.environ.get("SDPO_TEST_BACKENDS") or ("eager,triton,native" if ON_CUDA else "eager,native")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")

served: list[str] = []  # methods of the backend under test that were called, or why it was not


def skip_unless_supported(backend: str, dtype: torch.dtype, outputs: tuple[str, ...] = ()) -> None:
    """Skip a test of what a backend says it does not do."""
    request = Request(torch.device(DEVICE), dtype, dtype, Head(), outputs)
    reason = backends.BACKENDS[backend].supports(request)
    if reason is not None:
        served.append("skipped")
        pytest.skip(f"{backend}: {reason}")


def problem(dtype: torch.dtype, n: int = 333, h: int = 64, v: int = 5003) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [n, h] and weight [v, h] with gradients, and targets [n], every fifth not scored."""
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(v, h, device=DEVICE).div(4).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    targets[1::5] = -100
    return hidden, weight, targets


def doubles(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float64, as leaves with gradients."""
    return [t.detach().double().requires_grad_() for t in tensors]


def truth(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, logit_scale: float = 1.0,
    temperature: float = 1.0, **_: Any,
) -> Tensor:  # fmt: skip
    """Log-probs [n] in float64."""
    z = hidden.double() @ weight.double().T * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logps = (z / temperature).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return logps * (targets >= 0)


def error(found: Tensor, right: Tensor) -> float:
    """‖found − right‖ ÷ ‖right‖."""
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def run_alone(call: str) -> subprocess.CompletedProcess[str]:
    """`call`, a function of tests.cuda, in a process of its own: a device assert ends a process's use of the device."""
    module = call.partition("(")[0].rpartition(".")[0]
    code = f"import {module}; print({call})"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90)

"""Log-probs of existing logits: the native kernels, with and without 128-bit loads, and plain torch."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import backends, logits_logps
from tests.cuda.common import DEVICE, error, served

# V a multiple of 16 bytes or not; and rows that begin between two such addresses
LAYOUTS = {"128 bits": (4096, 0, 4096), "odd V": (5003, 0, 5003), "rows one element further": (4096, 1, 4104)}


@pytest.fixture(autouse=True)
def _serves_rows(backend):
    reason = backends.BACKENDS[backend].supports_rows(torch.device(DEVICE), torch.bfloat16)
    if reason is not None:
        served.append("skipped")
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, temperature, layout):
    columns, first, width = LAYOUTS[layout]
    torch.manual_seed(0)
    base = torch.randn(64, width, device=DEVICE).mul(3).to(dtype).requires_grad_()
    logits = base[:, first : first + columns]
    targets = torch.randint(columns, (64,), device=DEVICE)
    targets[3] = -100
    coefficients = torch.linspace(-1, 2, 64, device=DEVICE)

    found = logits_logps(logits, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad((found * coefficients).sum(), logits)
    twin = logits.detach().double().requires_grad_()
    right = (twin / temperature).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * (targets >= 0)
    (right * coefficients).sum().backward()
    assert error(found, right) < 1e-6
    assert error(gradient, twin.grad) < max(torch.finfo(dtype).eps, 1e-5)
    assert (gradient[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(dtype):
    logits = torch.randn(64, 5003, device=DEVICE).to(dtype)
    targets = torch.randint(5003, (64,), device=DEVICE)
    leaf = logits.clone().requires_grad_()
    logits_logps(leaf * 1.0, targets, inplace_backward=True).sum().backward()
    twin = logits.double().requires_grad_()
    twin.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert error(leaf.grad, twin.grad) < max(torch.finfo(dtype).eps, 1e-5)

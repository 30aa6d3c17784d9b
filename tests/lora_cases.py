"""A LoRA on the head, for every backend: `lora_b` apart gives what both side by side in one weight give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_kernels import linear_logps
from sdpo_kernels.backends import get_backend
from sdpo_kernels.rows import IGNORE_INDEX
from tests.reference import error

WIDTH, RANK, COLUMNS = 23, 7, 131
EPS = torch.finfo(torch.bfloat16).eps


def check_lora(backend: str, dtype: torch.dtype, stash_bytes: int, base_trains: bool, **options: Any) -> None:
    """Log-probs and gradients, and that a frozen weight's columns go into no product of the backward."""
    torch.manual_seed(0)
    hidden = torch.randn(7, WIDTH + RANK, dtype=dtype)
    weight = torch.randn(COLUMNS, WIDTH + RANK, dtype=dtype) * 0.3
    targets = torch.randint(COLUMNS, (7,))
    targets[2] = IGNORE_INDEX
    options |= {"backend": backend, "stash_bytes": stash_bytes}

    def gradients(found: Any, *inputs: Tensor) -> list[Tensor]:
        total = (found.logps * torch.linspace(-1, 1, 7)).sum() + sum(o.sum() for o in found[1:2] if o is not None)
        return list(torch.autograd.grad(total, inputs))

    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = linear_logps(whole[0], whole[1], targets, **options)
    dx, dw = gradients(expected, *whole)

    x, w, b = hidden.clone().requires_grad_(), weight[:, :WIDTH].clone(), weight[:, WIDTH:].clone().requires_grad_()
    w.requires_grad_(base_trains)
    found = linear_logps(x, w, targets, lora_b=b, **options)
    with trained_widths(backend) as widths:
        got = gradients(found, x, b, w) if base_trains else gradients(found, x, b)
    assert widths == [WIDTH + RANK if base_trains else RANK]
    assert torch.equal(found.logps, expected.logps)
    z = hidden.double() @ weight.double().t() / options.get("temperature", 1.0)
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z * options["temperature"] / cap) / options["temperature"]
    truth = z.log_softmax(1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    assert error(found.logps, truth.masked_fill(targets < 0, 0.0)) <= 16 * torch.finfo(torch.float32).eps
    for mine, theirs in zip(got, (dx, dw[:, WIDTH:], dw[:, :WIDTH]), strict=False):
        # a product of fewer columns may be summed in another order
        assert error(mine, theirs) <= (8 * torch.finfo(torch.float32).eps if dtype == torch.float32 else EPS)


@contextmanager
def trained_widths(backend: str) -> Iterator[list[int]]:
    """Collects the widths of the weight's gradients that a backend computes."""
    chosen, seen = get_backend(backend), list[int]()
    real = chosen.backward

    def backward(*args: Any) -> Any:
        found = real(*args)
        seen.append(found.weight.shape[1])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen, "backward", backward)
        yield seen

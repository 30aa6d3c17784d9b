"""Matrix products summed and given in float32, whatever the session's settings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full(device: torch.device) -> Iterator[None]:
    """No autocast, TF32, bf16 shortcuts or bf16 split-K sums inside; the session's settings come back afterwards."""
    backends: Any = torch.backends  # its stubs lack mkldnn.matmul
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    split_k = backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    backend.fp32_precision = "ieee"
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction = split_k


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64): operands bfloat16 or float32."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed in float32 and rounded once to out's dtype."""
    if a.dtype == out.dtype and (a.is_cuda or a.dtype != torch.bfloat16):
        torch.mm(a, b, out=out)
    else:
        out.copy_(matmul(a, b))


def vector_matmul(v: Tensor, m: Tensor) -> Tensor:
    """v @ m in float32, `v` [N] float32, `m` [N, C] bfloat16 or float32: a bfloat16 product takes v in three parts."""
    if m.dtype != torch.bfloat16:
        return torch.mv(m.t(), v)
    parts, rest = [], v
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return matmul(torch.stack(parts), m).sum(0)

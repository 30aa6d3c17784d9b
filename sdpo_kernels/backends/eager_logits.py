"""Log-probs of existing logits in plain torch: a few rows at a time are cast to float32, never all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sdpo_kernels.backends.base import Keep, Saved
from sdpo_kernels.backends.chunk_math import RunningSums, dlogits
from sdpo_kernels.head import product_dtype
from sdpo_kernels.rows import IGNORE_INDEX

CHUNK_ELEMENTS = 2**22  # logits cast to float32 at a time


def logits_forward(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `base.Backend.logits_forward`."""
    logps = logits.new_zeros(logits.shape[0], dtype=product_dtype(logits.dtype))
    lse = torch.zeros_like(logps, dtype=torch.float64)
    for rows in _chunks(targets, logits.shape[1]):
        sums = RunningSums(rows.shape[0], logits.device, logps.dtype, outputs=())
        sums.add(_transformed(logits, rows, temperature), targets.index_select(0, rows))

        out = sums.finish(logits.shape[1], kept=None)
        logps.index_copy_(0, rows, out.logps)
        lse.index_copy_(0, rows, out.state[:, 0])
    return logps, lse


def logits_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, temperature: float, out: Tensor
) -> None:
    """See `base.Backend.logits_backward`."""
    for rows in _chunks(targets, logits.shape[1]):
        z = _transformed(logits, rows, temperature)
        saved = Saved(
            logps=logps.index_select(0, rows), state=lse.index_select(0, rows).unsqueeze(1), entropy=None, kept=None,
            rows=None, keep=Keep.nothing(),
        )  # fmt: skip
        coefficient = grad.index_select(0, rows).to(z.dtype)
        dz = dlogits(z, targets.index_select(0, rows), saved, coefficient, None)
        out.index_copy_(0, rows, dz.div_(temperature).to(out.dtype))

    # `out` may be new memory, so rows that are not scored have to be set as well
    out.index_fill_(0, (targets == IGNORE_INDEX).nonzero().squeeze(1), 0)


def _chunks(targets: Tensor, n_columns: int) -> Iterator[Tensor]:
    """Indices of the scored rows, as many at a time as keep their float32 logits within CHUNK_ELEMENTS."""
    scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    yield from scored.split(max(1, CHUNK_ELEMENTS // n_columns))


def _transformed(logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """A float32 (float64) copy of the rows `rows`, divided by temperature."""
    return logits.index_select(0, rows).to(product_dtype(logits.dtype)).div_(temperature)

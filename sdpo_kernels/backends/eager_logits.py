"""Log-probs of logits that exist, in plain torch: some rows at a time as float32, never all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sdpo_kernels.backends.base import KEEP_NOTHING, Saved
from sdpo_kernels.backends.chunk_math import RunningSums, dlogits
from sdpo_kernels.head import product_dtype
from sdpo_kernels.rows import IGNORE_INDEX

CHUNK_ELEMENTS = 2**22  # logits turned to float32 at a time


def logits_forward(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `base.Backend.logits_forward`."""
    logps = logits.new_zeros(logits.shape[0], dtype=product_dtype(logits.dtype))
    lse = torch.zeros_like(logps, dtype=torch.float64)
    for rows in _chunks(targets, logits.shape[1]):
        sums = RunningSums(rows.shape[0], logits.device, logps.dtype, ())
        sums.add(_transformed(logits, rows, temperature), targets.index_select(0, rows))
        out = sums.finish(logits.shape[1], None)
        logps.index_copy_(0, rows, out.logps)
        lse.index_copy_(0, rows, out.state[:, 0])
    return logps, lse


def logits_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, temperature: float, out: Tensor
) -> None:
    """See `base.Backend.logits_backward`."""
    for rows in _chunks(targets, logits.shape[1]):
        z = _transformed(logits, rows, temperature)
        state = lse.index_select(0, rows).unsqueeze(1)
        saved = Saved(logps.index_select(0, rows), state, None, None, None, KEEP_NOTHING)
        coefficient = grad.index_select(0, rows).to(z.dtype)
        dz = dlogits(z, targets.index_select(0, rows), saved, coefficient, None)
        out.index_copy_(0, rows, dz.div_(temperature).to(out.dtype))
    out.index_fill_(0, (targets == IGNORE_INDEX).nonzero().squeeze(1), 0)


def _chunks(targets: Tensor, n_columns: int) -> Iterator[Tensor]:
    """Numbers of scored rows, so many at a time that their float32 logits stay within CHUNK_ELEMENTS."""
    scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    yield from scored.split(max(1, CHUNK_ELEMENTS // n_columns))


def _transformed(logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """The chosen rows as fresh float32 (float64) logits over temperature."""
    return logits.index_select(0, rows).to(product_dtype(logits.dtype)).div_(temperature)
